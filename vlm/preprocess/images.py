"""From the bytes of an image file to what the image tower reads."""

import io
import warnings
from typing import Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from jaxtyping import Float, Num, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.errors import DataError

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "ImageConfig",
    "Pixels",
    "decode_image",
    "decode_picture",
    "flatten_image",
    "normalise_images",
    "prepare_image",
    "resize_image",
    "stack_images",
]

DEFAULT_MAX_PIXELS = 50_000_000
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_ALLOWED = ", ".join(_FORMATS)
_MODES_WITH_ALPHA = ("RGBA", "LA", "PA")
_ORIENTATION = 0x0112
_MOST_SCANS = 16
"""Of a JPEG that is as large as allowed; of a smaller one as many more."""
_MOST_RUNS = 1024 * 1024
"""Bytes or pixels of a run-length coded BMP, which Pillow decodes in Python, in 0.3 s as many."""
_RUNS = (1, 2)
"""What a BMP calls run-length coding of 8 and of 4 bits."""
_MAX_ASPECT = 64
"""Of what is scaled; the centre crop keeps 1."""

Pixels = UInt8[np.ndarray, "rows columns 3"]
"""A decoded RGB image, rows of pixels as they lie in a file."""


class ImageConfig(Config):
    """How an image becomes the tensor that the image tower reads.

    Mean and std default to those of OpenAI's CLIP, which most open models share.
    """

    size: int = Field(224, ge=8, le=4096)
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    """`shortest` scales the shorter side and crops the centre; `squash` ignores the aspect."""
    jpeg_margin: float | None = Field(None, ge=1)
    """Decode a JPEG at 1/2, 1/4 or 1/8 as long as its sides stay above this many times `size`.

    Much faster for large photographs, but other pixels: with 3, of 16 photographs the mean change
    was 0.6 gray levels, of the worst 1.6, at edges up to 36. By default every pixel is decoded.
    """

    def decode_side(self, size: int | None = None) -> int | None:
        """Shortest side that `decode_image` must keep for a square of `size`, or none for all."""
        if self.jpeg_margin is None:
            return None
        return round(self.jpeg_margin * (self.size if size is None else size))


def decode_image(
    data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, min_side: int | None = None
) -> Pixels:
    """Decode an image file to RGB, upright and without transparency.

    The format is recognised by content, never by name. EXIF orientation is applied and all
    metadata dropped. Transparent pixels are laid over white.

    Args:
        data: The bytes of a JPEG, PNG, WebP, GIF (first frame) or BMP file.
        max_pixels: Larger images are refused before any pixel is decoded.
        min_side: A JPEG may be decoded at 1/2, 1/4 or 1/8 if no side falls below this.

    Raises:
        DataError: If the bytes are no such image, are truncated, exceed `max_pixels`, or take many
            times as long to decode as others of their size.
    """
    try:
        with warnings.catch_warnings():
            # Our own limit below is stricter than Pillow's warning about large images.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                message = (
                    f"the image is {width} x {height} = {width * height} pixels, "
                    f"over the limit of {max_pixels}; make it smaller"
                )
                raise DataError(message)
            _refuse_endless_scans(image, data, max_pixels)
            _refuse_endless_runs(image, data)
            pixels = _plain_jpeg(image, data, min_side)
            if pixels is None:
                pixels = np.array(flatten_image(ImageOps.exif_transpose(image)))
            return pixels
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        # Pillow's own text names its own limit, which is none of ours.
        message = f"the image is far over the limit of {max_pixels} pixels; make it smaller"
        raise DataError(message) from error
    except UnidentifiedImageError as error:  # its own text holds the address of an object
        message = f"not a readable image, of no known kind; allowed formats are {_ALLOWED}"
        raise DataError(message) from error
    # Pillow's decoders raise many types for damaged input; each means the same to the sender.
    except Exception as error:
        message = (
            f"not a readable image ({type(error).__name__}: {error}); "
            f"allowed formats are {_ALLOWED}"
        )
        raise DataError(message) from error


def _refuse_endless_scans(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Raise DataError for a JPEG that goes over its pixels so often that decoding takes minutes.

    A progressive one has some ten scans, each of which may touch every pixel; a few bytes make one
    more. Within a scan 0xFF never stands before 0xDA, so what is counted are scans, and those of
    small pictures in the metadata.
    """
    if image.format != "JPEG":
        return
    scans, pixels = data.count(b"\xff\xda"), image.size[0] * image.size[1]
    most = max(_MOST_SCANS, _MOST_SCANS * max_pixels // max(pixels, 1))
    if scans > most:
        message = f"the JPEG has {scans} scans, at most {most} at its size; save it again"
        raise DataError(message)


def _refuse_endless_runs(image: Image.Image, data: bytes) -> None:
    """Raise DataError for a large run-length coded BMP; nobody has written those for decades.

    An end of a line fills it up pixel by pixel, so that a small file may hold very many.
    """
    if image.format != "BMP" or image.info.get("compression", 0) not in _RUNS:
        return
    size = max(len(data), image.size[0] * image.size[1])
    if size > _MOST_RUNS:
        message = (
            f"the BMP is run-length coded and has {size} bytes or pixels, at most {_MOST_RUNS} are "
            f"read of such; save it as PNG"
        )
        raise DataError(message)


def decode_picture(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """What `decode_image` returns, as an image of Pillow: for tools that draw, crop and hash."""
    return Image.fromarray(decode_image(data, max_pixels=max_pixels))


def _plain_jpeg(image: Image.Image, data: bytes, min_side: int | None) -> Pixels | None:
    """Pixels of an upright gray or colour JPEG, by libjpeg-turbo without detours.

    None for whatever else: Pillow decides about it, also about JPEGs that are not quite whole.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    if image.getexif().get(_ORIENTATION, 1) != 1:
        return None
    width, height = image.size
    factor = 1
    while min_side is not None and factor < 8 and min(width, height) // (2 * factor) >= min_side:
        factor *= 2
    try:
        # The limits choose the scale; others than halves would be slower than none.
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor)
        )
    except ValueError:
        return None
    return pixels


def flatten_image(image: Image.Image) -> Image.Image:
    """Lay transparent pixels over white and convert to RGB; of 16 bits a level, the upper 8."""
    if image.mode.startswith("I"):  # Pillow would cut all levels over 255 to white
        levels, transparent = np.asarray(image), image.info.get("transparency")
        gray = (levels >> 8).astype(np.uint8)
        if isinstance(transparent, int):
            gray[levels == transparent] = 255
        image = Image.fromarray(gray)
    if image.mode in _MODES_WITH_ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        ground.alpha_composite(rgba)
        return ground.convert("RGB")
    return image.convert("RGB")


def resize_image(
    image: Pixels | Image.Image, config: ImageConfig, *, size: int | None = None
) -> UInt8[np.ndarray, "channel height width"]:
    """Resize an RGB image to the model's square input, antialiased.

    Args:
        image: What `decode_image` returned, or an image of Pillow.
        config: Mode and interpolation; `config.size` is the side unless `size` is given.
        size: Another side, e.g. a margin for random crops in training.

    Returns:
        A view of pixels that lie in memory by rows, channels last, as convolutions read fastest.
    """
    side = config.size if size is None else size
    pixels = np.array(flatten_image(image)) if isinstance(image, Image.Image) else image
    if config.resize_mode == "shortest":
        pixels = _middle(pixels)
    height, width = pixels.shape[:2]
    if config.resize_mode == "squash":
        target = (side, side)
    elif width <= height:
        target = (max(side, int(side * height / width)), side)
    else:
        target = (side, max(side, int(side * width / height)))
    if target != (height, width):
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        # Pillow 13 shrinks the height first where that saves more, and rounds in between.
        if height - target[0] > 2 * max(0, width - target[1]):
            batch = F.interpolate(
                batch, (target[0], width), mode=config.interpolation, antialias=True
            )
        resized = F.interpolate(batch, target, mode=config.interpolation, antialias=True)
        pixels = resized[0].permute(1, 2, 0).numpy()
    top, left = round((target[0] - side) / 2), round((target[1] - side) / 2)
    square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    return square.transpose(2, 0, 1)


def _middle(pixels: Pixels) -> UInt8[np.ndarray, "_ _ 3"]:
    """The middle of a very long image, whose ends the centre crop would drop after scaling them.

    Of a picture of 1 x 50,000,000 pixels they would take 300 GB. As much goes on either side, so
    that the middle stays where it was.
    """
    height, width = pixels.shape[:2]
    longest = _MAX_ASPECT * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return pixels[top : height - top, left : width - left]


def prepare_image(
    data: bytes, config: ImageConfig, *, size: int | None = None
) -> UInt8[np.ndarray, "channel height width"]:
    """`decode_image`, then `resize_image`.

    Raises:
        DataError: If the bytes are no image that can be decoded.
    """
    pixels = decode_image(data, min_side=config.decode_side(size))
    return resize_image(pixels, config, size=size)


def stack_images(
    images: list[UInt8[np.ndarray, "channel height width"]],
) -> UInt8[Tensor, "batch channel height width"]:
    """One batch of `resize_image` results, channels last in memory: each is copied once."""
    rows = np.stack([image.transpose(1, 2, 0) for image in images])
    return torch.from_numpy(rows).permute(0, 3, 1, 2)


def normalise_images(
    images: Num[Tensor, "batch channel height width"], config: ImageConfig
) -> Float[Tensor, "batch channel height width"]:
    """Scale gray levels 0 to 255 to [0, 1], subtract the mean, divide by the deviation."""
    mean = torch.tensor(config.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(config.std, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std
