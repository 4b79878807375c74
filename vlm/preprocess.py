"""Pixels and tokens: the one module that training and serving share.

Both see the same input because both call it.

Images: bytes -> `decode_image` (RGB, safe limits) -> `resize_image` (uint8, square) ->
`normalise_images` (float). Text: `build_tokenizer`. `resize_image` gives the very pixels of
open_clip's evaluation transform, which the tests hold.
"""

import io
import warnings
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, Num, UInt8
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.errors import DataError
from vlm.types import Tokenize

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "ImageConfig",
    "TokenizerConfig",
    "build_tokenizer",
    "decode_image",
    "flatten_image",
    "normalise_images",
    "resize_image",
    "tokenizer_vocabulary",
    "trim_padding",
]

DEFAULT_MAX_PIXELS = 50_000_000
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_MODES_WITH_ALPHA = ("RGBA", "LA", "PA")


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


class TokenizerConfig(Config):
    """open_clip's byte-pair tokenizer, which needs no download."""

    type: Literal["simple"] = "simple"
    context_length: int = Field(77, ge=4)
    """Positions of a tokenized caption, start and end marks included."""


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode an image file to RGB, upright and without transparency.

    The format is recognised by content, never by name. EXIF orientation is applied and all
    metadata dropped. Transparent pixels are laid over white.

    Args:
        data: The bytes of a JPEG, PNG, WebP, GIF (first frame) or BMP file.
        max_pixels: Larger images are refused before any pixel is decoded.

    Raises:
        DataError: If the bytes are no such image, are truncated, or exceed `max_pixels`.
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
            # With draft a JPEG would be decoded at reduced scale: cheaper, but other pixels.
            return flatten_image(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        message = f"the image is over the limit of {max_pixels} pixels ({error}); make it smaller"
        raise DataError(message) from error
    # Pillow's decoders raise many types for damaged input; each means the same to the sender.
    except Exception as error:
        message = (
            f"not a readable image ({type(error).__name__}: {error}); "
            f"allowed formats are {', '.join(_FORMATS)}"
        )
        raise DataError(message) from error


def flatten_image(image: Image.Image) -> Image.Image:
    """Lay transparent pixels over white and convert to RGB."""
    if image.mode in _MODES_WITH_ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        ground.alpha_composite(rgba)
        return ground.convert("RGB")
    return image.convert("RGB")


def resize_image(
    image: Image.Image, config: ImageConfig, *, size: int | None = None
) -> UInt8[np.ndarray, "channel height width"]:
    """Resize an RGB image to the model's square input, antialiased.

    Args:
        image: An RGB image.
        config: Mode and interpolation; `config.size` is the side unless `size` is given.
        size: Another side, e.g. a margin for random crops in training.
    """
    side = config.size if size is None else size
    resample = getattr(Image.Resampling, config.interpolation.upper())
    width, height = image.size
    if config.resize_mode == "squash":
        target = (side, side)
    elif width <= height:
        target = (side, max(side, int(side * height / width)))
    else:
        target = (max(side, int(side * width / height)), side)
    resized = image if target == image.size else image.resize(target, resample)
    left, top = round((target[0] - side) / 2), round((target[1] - side) / 2)
    if target != (side, side):
        resized = resized.crop((left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def normalise_images(
    images: Num[Tensor, "batch channel height width"], config: ImageConfig
) -> Float[Tensor, "batch channel height width"]:
    """Scale gray levels 0 to 255 to [0, 1], subtract the mean, divide by the deviation."""
    mean = torch.tensor(config.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(config.std, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


def build_tokenizer(config: TokenizerConfig) -> Tokenize:
    """The function from captions to padded token ids; long captions are cut, keeping the end mark.

    Deterministic, and safe to call from threads.
    """
    from open_clip.tokenizer import SimpleTokenizer  # noqa: PLC0415 - seconds, and data verbs skip it

    return partial(_tokenize, SimpleTokenizer(context_length=config.context_length))


def tokenizer_vocabulary(config: TokenizerConfig) -> Path:
    """The file of merges that the tokenizer was built from."""
    from open_clip.tokenizer import default_bpe  # noqa: PLC0415 - seconds, and data verbs skip it

    return Path(default_bpe())


def _tokenize(tokenizer: Tokenize, captions: list[str]) -> Int64[Tensor, "batch token"]:
    return tokenizer(captions)


def trim_padding(token_ids: Int64[Tensor, "batch token"]) -> Int64[Tensor, "batch longest"]:
    """Cut columns that are padding (0) in every row.

    Exact for causal text towers that read out the end mark: later positions cannot be seen.
    """
    longest = int((token_ids != 0).sum(dim=1).max()) if len(token_ids) else 0
    return token_ids[:, : max(longest, 1)]
