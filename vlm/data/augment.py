"""Random changes of a batch of images, made on the device for all images at once.

One affine resampling does scale, aspect, rotation, shear, shift and flip together, so pixels are
interpolated once; one 3 x 3 matrix a sample does brightness, contrast, saturation and hue; blur
and solarisation touch those images that drew them. The numbers come from `views.py`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from vlm.config import Config
from vlm.data.views import ViewsConfig

__all__ = ["AugmentConfig", "augment_images", "augment_views"]

_LEAST_BLUR = 0.1
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
    min_area: float | None = Field(None, gt=0, le=1)
    """Random-resized-crop (arXiv:1409.4842): the crop's area is uniform from this fraction of the
    image's to `max_area`, its log aspect within `aspect` (0.288 is 3 to 4), its place anywhere
    inside. Then `min_scale`, `max_scale` and `shift` stay unset."""
    max_area: float = Field(1.0, gt=0, le=1)
    blur_probability: float = Field(0.0, ge=0, le=1)
    max_blur: float = Field(2.0, ge=_LEAST_BLUR, le=16)
    """Largest standard deviation of a Gaussian blur, in pixels of the result; the least is 0.1
    (SimCLR, arXiv:2002.05709: 2.0 at 224 pixels)."""
    solarise_probability: float = Field(0.0, ge=0, le=1)
    """Of turning gray levels from 128 up into their negatives (BYOL, arXiv:2006.07733)."""
    views: ViewsConfig = ViewsConfig()
    """Several crops of each image."""

    @model_validator(mode="after")
    def _one_kind_of_crop(self) -> "AugmentConfig":
        by_side = self.min_scale != 1 or self.max_scale != 1 or self.shift != 0
        if self.min_area is not None and by_side:
            message = "give either min_area, or min_scale, max_scale and shift"
            raise ValueError(message)
        if self.min_area is not None and self.min_area > self.max_area:
            message = f"min_area={self.min_area} is above max_area={self.max_area}"
            raise ValueError(message)
        return self


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """Uniform numbers in [-1, 1] (`signed`) or [0, 1], one row an image."""

    values: Float[Tensor, "batch draw"]

    def signed(self, index: int) -> Tensor:
        return self.values[:, index] * 2 - 1

    def unsigned(self, index: int) -> Tensor:
        return self.values[:, index]


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
        draws: This rank's rows of one view of `draw_views`.
        config: Ranges of the changes.
        size: Side of the result in pixels.

    Returns:
        Gray levels in [0, 255], float32, not yet normalised.
    """
    numbers = _Draws(values=draws.to(images.device))
    changed = _recolour(_resample(images, numbers, config, size), numbers, config)
    # Which images these two touch is decided before anything goes to the device: nothing waits.
    if config.blur_probability:
        rows = torch.nonzero(draws[:, 12] < config.blur_probability).flatten()
        sigma = _LEAST_BLUR + (config.max_blur - _LEAST_BLUR) * draws[rows, 13]
        if len(rows):  # a small batch may have none, and padding refuses an empty one
            rows = rows.to(images.device)
            changed[rows] = _blurred(changed[rows], sigma.to(images.device), config.max_blur)
    if config.solarise_probability:
        rows = torch.nonzero(draws[:, 14] < config.solarise_probability).flatten()
        rows = rows.to(images.device)
        changed[rows] = torch.where(changed[rows] < 128, changed[rows], 255 - changed[rows])
    return changed


def _resample(
    images: UInt8[Tensor, "batch channel in_height in_width"],
    draws: _Draws,
    config: AugmentConfig,
    size: int,
) -> Float[Tensor, "batch channel height width"]:
    horizontal, vertical, shift = _crop(draws, config)
    angle = math.radians(config.rotation_degrees) * draws.signed(2)
    shear = config.shear * draws.signed(3)
    flip = torch.where(draws.unsigned(4) < config.flip_probability, -1.0, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    matrix = torch.stack(
        [
            torch.stack([horizontal * cos * flip, shear - vertical * sin], dim=-1),
            torch.stack([horizontal * sin * flip, vertical * cos], dim=-1),
        ],
        dim=1,
    )  # [batch 2 2]
    theta = torch.cat([matrix, shift[:, :, None]], dim=-1)
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    # grid_sample pads with 0, so the fill colour is moved to 0 and back.
    shifted = images.float() - config.fill
    return F.grid_sample(shifted, grid, mode="bilinear", align_corners=False) + config.fill


def _crop(draws: _Draws, config: AugmentConfig) -> tuple[Tensor, Tensor, Float[Tensor, "batch 2"]]:
    """Width and height of the crops, as fractions of the image's, and their centres."""
    stretch = torch.exp(0.5 * config.aspect * draws.signed(1))
    shift = torch.stack([draws.signed(5), draws.signed(6)], dim=-1)
    if config.min_area is None:
        low, high = math.log(config.min_scale), math.log(config.max_scale)
        scale = torch.exp(low + (high - low) * draws.unsigned(0))
        return scale * stretch, scale / stretch, config.shift * shift
    area = config.min_area + (config.max_area - config.min_area) * draws.unsigned(0)
    # A crop that is too long for the image is cut to its side.
    horizontal = (area.sqrt() * stretch).clamp(max=1)
    vertical = (area.sqrt() / stretch).clamp(max=1)
    room = torch.stack([1 - horizontal, 1 - vertical], dim=-1)
    return horizontal, vertical, room * shift


def _blurred(
    images: Float[Tensor, "batch channel height width"],
    sigma: Float[Tensor, " batch"],
    max_sigma: float,
) -> Float[Tensor, "batch channel height width"]:
    """A Gaussian of its own for each image, along rows and then along columns; edges repeat."""
    batch, channels, height, width = images.shape
    radius = min(math.ceil(3 * max_sigma), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.softmax(-0.5 * (offsets / sigma[:, None]).square(), dim=1)
    kernel = kernel.repeat_interleave(channels, dim=0)  # [batch * channel, tap]
    stacked = images.reshape(1, batch * channels, height, width)
    stacked = F.pad(stacked, (radius, radius, radius, radius), mode="replicate")
    stacked = F.conv2d(stacked, kernel[:, None, None, :], groups=batch * channels)
    stacked = F.conv2d(stacked, kernel[:, None, :, None], groups=batch * channels)
    return stacked.view_as(images)


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


def augment_views(
    images: UInt8[Tensor, "batch channel in_height in_width"],
    draws: Float[Tensor, "view batch draw"],
    config: AugmentConfig,
    *,
    size: int,
) -> list[Float[Tensor, "batch channel _ _"]]:
    """All views of a batch: the full ones, then the small ones.

    Args:
        images: As for `augment_images`.
        draws: This rank's rows of `draw_views`, of all views.
        config: Ranges of the changes, and how many views.
        size: Side of the full views in pixels.
    """
    low, high = config.views.small_area
    of_part = {"min_area": low, "max_area": high, "min_scale": 1.0, "max_scale": 1.0, "shift": 0.0}
    small = config.model_copy(update=of_part)
    small_size = config.views.small_size or size
    full_draws, small_draws = draws[: config.views.full], draws[config.views.full :]
    return [
        *(augment_images(images, numbers, config, size=size) for numbers in full_draws),
        *(augment_images(images, numbers, small, size=small_size) for numbers in small_draws),
    ]
