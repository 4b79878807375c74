"""Random changes of a batch of images, made on the device for all images at once.

One affine resampling does scale, aspect, rotation, shear, shift and flip together, so pixels are
interpolated once; one 3 x 3 matrix a sample does brightness, contrast, saturation and hue.
Parameters are drawn for the whole global batch from a generator keyed by (seed, step), and each
rank takes its rows: any number of ranks sees the same images.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from vlm.config import Config

__all__ = ["AugmentConfig", "augment_images", "draw_uniform"]

_NUM_DRAWS = 14
# Luma, and the two chroma axes of NTSC's YIQ: hue is a rotation of the chroma plane.
_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


class AugmentConfig(Config):
    """Ranges of random changes; the defaults change nothing but the crop.

    Every range is symmetric around no change and sampled uniformly.
    """

    margin: float = Field(1.0, ge=1, le=4)
    """Images are prepared at `margin` times the model's size, so that crops keep detail."""
    min_scale: float = Field(1.0, gt=0, le=1)
    """Smallest side of the crop, as a fraction of the image side."""
    max_scale: float = Field(1.0, ge=1, le=2)
    """Largest side of the crop; above 1 the image shrinks and `fill` surrounds it."""
    aspect: float = Field(0.0, ge=0, lt=1)
    """Largest change of log aspect ratio."""
    rotation_degrees: float = Field(0.0, ge=0, le=180)
    shear: float = Field(0.0, ge=0, lt=1)
    shift: float = Field(0.0, ge=0, lt=1)
    """Largest shift of the crop's centre, in half image sides."""
    flip_probability: float = Field(0.0, ge=0, le=1)
    brightness: float = Field(0.0, ge=0, le=1)
    contrast: float = Field(0.0, ge=0, lt=1)
    saturation: float = Field(0.0, ge=0, le=1)
    hue_degrees: float = Field(0.0, ge=0, le=180)
    gray_probability: float = Field(0.0, ge=0, le=1)
    fill: int = Field(255, ge=0, le=255)
    """Gray level outside the image."""


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """Uniform numbers in [-1, 1] (`signed`) or [0, 1], one row an image."""

    values: Float[Tensor, "batch draw"]

    def signed(self, index: int) -> Tensor:
        return self.values[:, index] * 2 - 1

    def unsigned(self, index: int) -> Tensor:
        return self.values[:, index]


def draw_uniform(*, seed: int, step: int, global_batch: int) -> Float[Tensor, "global_batch draw"]:
    """The random numbers of one global step, the same on every rank."""
    generator = torch.Generator().manual_seed((seed << 32) + step)
    return torch.rand(global_batch, _NUM_DRAWS, generator=generator)


def augment_images(
    images: UInt8[Tensor, "batch channel in_height in_width"],
    draws: Float[Tensor, "batch draw"],
    config: AugmentConfig,
    *,
    size: int,
) -> Float[Tensor, "batch channel height width"]:
    """Change each image at random and resample it to `size` by `size`.

    Args:
        images: Square RGB images, usually larger than `size` by `config.margin`.
        draws: This rank's rows of `draw_uniform`.
        config: Ranges of the changes.
        size: Side of the result in pixels.

    Returns:
        Gray levels in [0, 255], float32, not yet normalised.
    """
    numbers = _Draws(values=draws.to(images.device))
    return _recolour(_resample(images, numbers, config, size), numbers, config)


def _resample(
    images: UInt8[Tensor, "batch channel in_height in_width"],
    draws: _Draws,
    config: AugmentConfig,
    size: int,
) -> Float[Tensor, "batch channel height width"]:
    low, high = math.log(config.min_scale), math.log(config.max_scale)
    scale = torch.exp(low + (high - low) * draws.unsigned(0))
    stretch = torch.exp(0.5 * config.aspect * draws.signed(1))
    angle = math.radians(config.rotation_degrees) * draws.signed(2)
    shear = config.shear * draws.signed(3)
    flip = torch.where(draws.unsigned(4) < config.flip_probability, -1.0, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    horizontal, vertical = scale * stretch, scale / stretch
    matrix = torch.stack(
        [
            torch.stack([horizontal * cos * flip, shear - vertical * sin], dim=-1),
            torch.stack([horizontal * sin * flip, vertical * cos], dim=-1),
        ],
        dim=1,
    )  # [batch 2 2]
    shift = config.shift * torch.stack([draws.signed(5), draws.signed(6)], dim=-1)
    theta = torch.cat([matrix, shift[:, :, None]], dim=-1)
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    # grid_sample pads with 0, so the fill colour is moved to 0 and back.
    shifted = images.float() - config.fill
    return F.grid_sample(shifted, grid, mode="bilinear", align_corners=False) + config.fill


def _recolour(
    images: Float[Tensor, "batch channel height width"], draws: _Draws, config: AugmentConfig
) -> Float[Tensor, "batch channel height width"]:
    """One affine map of colour a sample: chroma scaled and turned, contrast, brightness."""
    saturation = 1 + config.saturation * draws.signed(7)
    gray = draws.unsigned(8) < config.gray_probability
    saturation = torch.where(gray, 0.0, saturation)
    angle = math.radians(config.hue_degrees) * draws.signed(9)
    contrast = 1 + config.contrast * draws.signed(10)
    brightness = 255 * config.brightness * draws.signed(11)

    cos, sin = saturation * torch.cos(angle), saturation * torch.sin(angle)
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    chroma = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=-1)
    to_yiq = torch.tensor(_TO_YIQ, device=images.device)
    matrix = torch.linalg.inv(to_yiq) @ chroma.view(-1, 3, 3) @ to_yiq  # [batch 3 3]
    # Contrast turns around each image's mean gray level, which chroma changes leave in place.
    mean = images.mean(dim=(1, 2, 3))
    offset = ((1 - contrast) * mean + brightness)[:, None, None].expand(-1, 3, 1)
    matrix = matrix * contrast[:, None, None]
    flat = images.flatten(2)
    recoloured = torch.baddbmm(offset, matrix, flat)
    return recoloured.clamp(0, 255).view_as(images)
