"""Image towers that give a row for each place of an image, for a decoder to look at."""

from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from vlm.models.attention import Block, run_block
from vlm.models.towers import TimmTower, VisionTransformerTower

__all__ = ["ImageTokens", "TokenTower", "build_image_tokens"]

TokenTower = Annotated[VisionTransformerTower | TimmTower, Field(discriminator="type")]


@runtime_checkable
class ImageTokens(Protocol):
    """Normalised images to rows of `width`."""

    width: int

    def __call__(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch place token_width"]: ...


def build_image_tokens(config: TokenTower, *, image_size: int) -> nn.Module:
    """The module of a tower, with fresh weights; it fulfils `ImageTokens`.

    Raises:
        ValueError: If the image is no whole number of patches.
    """
    if isinstance(config, TimmTower):
        return TimmTokens(config, image_size=image_size)
    return VisionTransformerTokens(config, image_size=image_size)


class VisionTransformerTokens(nn.Module):
    """Vision transformer without a class token (arXiv:2010.11929), layer-normed at the end."""

    def __init__(self, config: VisionTransformerTower, *, image_size: int) -> None:
        super().__init__()
        self.width = config.width
        self._patch_dropout = config.patch_dropout
        side, rest = divmod(image_size, config.patch_size)
        if rest:
            message = f"images of {image_size} px are no whole number of {config.patch_size} px"
            raise ValueError(message)
        self.patches = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(side * side, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.width // config.head_width, mlp_ratio=config.mlp_ratio)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self._recompute = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self._recompute = enable

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch place token_width"]:
        rows = self.patches(images).flatten(2).transpose(1, 2) + self.positional_embedding
        if self.training and self._patch_dropout > 0:
            rows = _some_places(rows, 1 - self._patch_dropout)
        for block in self.blocks:
            rows = run_block(block, rows, recompute=self._recompute and self.training)
        return self.norm(rows)


class TimmTokens(nn.Module):
    """The last feature map of any image model of timm, each place with a position of its own."""

    def __init__(self, config: TimmTower, *, image_size: int) -> None:
        import timm  # noqa: PLC0415 - seconds, only builders pay

        super().__init__()
        options: dict[str, Any] = {}
        if config.drop_path is not None:
            options["drop_path_rate"] = config.drop_path
        if config.patch_dropout:
            options["patch_drop_rate"] = config.patch_dropout
        self.trunk = timm.create_model(config.name, num_classes=0, global_pool="", **options)
        if hasattr(self.trunk, "set_input_size"):
            self.trunk.set_input_size(image_size)  # type: ignore[operator] # timm has no types
        self.width = int(self.trunk.num_features)  # type: ignore[arg-type] # timm has no types
        # Only running shows how many places there are; in evaluation mode, to move no statistics.
        with torch.no_grad():
            places = self._places(self.trunk.eval(), torch.zeros(1, 3, image_size, image_size))
        self.trunk.train()
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(places.shape[1], self.width))
        self.norm = nn.LayerNorm(self.width)

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch place token_width"]:
        return self.norm(self._places(self.trunk, images)) + self.positional_embedding

    def _places(self, trunk: nn.Module, images: Tensor) -> Tensor:
        """Feature maps, channels first or last, and token rows, all as [batch place width]."""
        found: Tensor = trunk.forward_features(images)  # type: ignore[operator] # timm has no types
        if found.ndim == 3:
            return found
        if found.shape[1] == self.width:
            return found.flatten(2).transpose(1, 2)
        return found.flatten(1, 2)


def _some_places(rows: Tensor, kept_fraction: float) -> Tensor:
    """A random part of each image's places, at least one (FLIP, arXiv:2212.00794)."""
    kept = max(1, round(rows.shape[1] * kept_fraction))
    order = torch.rand(rows.shape[:2], device=rows.device).argsort(dim=1)[:, :kept]
    return rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2]))
