"""Towers: what can be put behind each modality, and how open_clip spells it.

Every tower here is one that open_clip builds from its `model_cfg`, so that whatever is trained can
be opened by plain open_clip. A new tower is a new class with `open_clip_config()` and one more
member of the union below.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from vlm.config import Config

__all__ = [
    "ImageTower",
    "ResNetTower",
    "TextTower",
    "TextTransformerTower",
    "TimmTower",
    "VisionTransformerTower",
]


class VisionTransformerTower(Config):
    """Vision transformer with a class token (arXiv:2010.11929), as in CLIP."""

    type: Literal["vit"] = "vit"
    width: int = Field(768, ge=8)
    layers: int = Field(12, ge=1)
    head_width: int = Field(64, ge=4)
    patch_size: int = Field(32, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    patch_dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of patches dropped in training (FLIP, arXiv:2212.00794)."""

    def open_clip_config(self) -> dict[str, Any]:
        return self.model_dump(exclude={"type"})


class ResNetTower(Config):
    """CLIP's modified ResNet: three-convolution stem, blur-free pooling strides, attention pool.

    Cheap on small images and stronger than a transformer when pairs are few. Source: section 2.4
    of CLIP (arXiv:2103.00020).
    """

    type: Literal["resnet"] = "resnet"
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = Field(64, ge=2)
    """Channels of the first stage; the last has 32 times as many."""
    head_width: int = Field(64, ge=4)

    def open_clip_config(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "width": self.width, "head_width": self.head_width}


class TimmTower(Config):
    """Any image model that timm knows by name, without pretrained weights unless asked for."""

    type: Literal["timm"] = "timm"
    name: str
    """As in `timm.list_models()`."""
    pretrained: bool = False
    """Start from timm's weights; needs a model hub or its local cache."""
    pool: str = "avg"
    drop_path: float | None = Field(None, ge=0, lt=1)

    def open_clip_config(self) -> dict[str, Any]:
        return {
            "timm_model_name": self.name,
            "timm_model_pretrained": self.pretrained,
            "timm_pool": self.pool,
            "timm_proj": "linear",
            "timm_drop_path": self.drop_path,
        }


class TextTransformerTower(Config):
    """CLIP's causal text transformer, read out at the end mark (arXiv:2103.00020)."""

    type: Literal["transformer"] = "transformer"
    width: int = Field(512, ge=8)
    layers: int = Field(12, ge=1)
    heads: int = Field(8, ge=1)
    vocab_size: int = Field(49408, ge=3)

    def open_clip_config(self) -> dict[str, Any]:
        return self.model_dump(exclude={"type"})


ImageTower = Annotated[
    VisionTransformerTower | ResNetTower | TimmTower, Field(discriminator="type")
]
TextTower = TextTransformerTower
