"""Several random views of each image of a batch, and the numbers that decide them.

Numbers are drawn for the whole global batch from a generator keyed by (seed, step), and each rank
takes its rows: any number of ranks sees the same images.
"""

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from vlm.config import Config

__all__ = ["ViewsConfig", "draw_views"]

# The first 14 are drawn together and first, so that what came later changes no earlier view.
_FIRST_DRAWS = 14
_LATER_DRAWS = 1


class ViewsConfig(Config):
    """How many crops of an image one step sees (multi-crop, arXiv:2006.09882).

    The loss is the mean over views of what each gives with the caption.
    """

    full: int = Field(1, ge=1, le=8)
    """Views as the rest of the section describes them; 2 in the paper."""
    small: int = Field(0, ge=0, le=16)
    """Further views of a small part of the image each."""
    small_area: tuple[float, float] = (0.05, 0.4)
    """Area of that part, as fractions of the image's; SwAV's 0.05 to 0.14, DINO's 0.05 to 0.4."""
    small_size: int | None = Field(None, ge=8)
    """Side of a small view in pixels; by default that of the others.

    Another side needs an image tower that reads any size.
    """

    @model_validator(mode="after")
    def _area_is_a_range(self) -> "ViewsConfig":
        low, high = self.small_area
        if not 0 < low <= high <= 1:
            message = f"small_area must rise within (0, 1], found {low} to {high}"
            raise ValueError(message)
        return self

    @property
    def total(self) -> int:
        return self.full + self.small


def draw_views(
    *, seed: int, step: int, global_batch: int, num_views: int = 1
) -> Float[Tensor, "view global_batch draw"]:
    """The random numbers in [0, 1) of one global step, the same on every rank."""
    generator = torch.Generator().manual_seed((seed << 32) + step)
    first = torch.rand(global_batch, _FIRST_DRAWS, generator=generator)
    later = torch.rand(global_batch, _LATER_DRAWS, generator=generator)
    width = _FIRST_DRAWS + _LATER_DRAWS
    others = torch.rand(num_views - 1, global_batch, width, generator=generator)
    return torch.cat([torch.cat([first, later], dim=1)[None], others])
