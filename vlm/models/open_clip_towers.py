"""Towers of open_clip's own models, by name or from a folder."""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.models.checkpoints import find_checkpoint

__all__ = ["OpenClipImageTower", "OpenClipTextTower"]


class _OpenClipTower(Config):
    type: Literal["open_clip"] = "open_clip"
    name: str
    """ViT-B-32, ViT-B-32/laion2b_s34b_b79k, hf-hub:NAME, local-dir:FOLDER: `models.checkpoints`."""
    pretrained: bool = False
    """Start from the checkpoint's weights; its projection only where `dim` is the same."""

    @property
    def quick_gelu(self) -> bool | None:
        return bool(find_checkpoint(self.name).model_config.get("quick_gelu", False))

    def _weights(self, prefix: str) -> dict[str, Tensor] | None:
        if not self.pretrained:
            return None
        state = find_checkpoint(self.name).read_weights()
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }


class OpenClipImageTower(_OpenClipTower):
    """The image tower of any model of open_clip, from scratch or from a checkpoint's weights."""

    patch_dropout: float | None = Field(None, ge=0, lt=1)
    """Fraction of patches dropped in training (FLIP, arXiv:2212.00794); none: as it was built."""

    @property
    def quick_gelu(self) -> bool | None:
        config = find_checkpoint(self.name).model_config
        vision = config["vision_cfg"]
        without_gelu = "timm_model_name" in vision or isinstance(vision.get("layers"), list)
        return None if without_gelu else bool(config.get("quick_gelu", False))

    def open_clip_config(self) -> dict[str, Any]:
        vision: dict[str, Any] = dict(find_checkpoint(self.name).model_config["vision_cfg"])
        if self.patch_dropout is not None:
            vision["patch_dropout"] = self.patch_dropout
        return vision

    def initial_weights(self) -> dict[str, Tensor] | None:
        return self._weights("visual.")


class OpenClipTextTower(_OpenClipTower):
    """The text tower of any model of open_clip, from scratch or from a checkpoint's weights."""

    def open_clip_config(self) -> dict[str, Any]:
        return dict(find_checkpoint(self.name).model_config["text_cfg"])

    def initial_weights(self) -> dict[str, Tensor] | None:
        return self._weights("text.")
