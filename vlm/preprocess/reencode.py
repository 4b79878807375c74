"""Image files to smaller ones, or to those of another format; what fits stays as it is."""

import io
import warnings
from typing import Final, Literal

from PIL import Image

from vlm.errors import DataError
from vlm.preprocess.images import DEFAULT_MAX_PIXELS, decode_image

__all__ = ["reencode_image"]

_STORABLE: Final = ("JPEG", "PNG", "WEBP")
_SAME: Final = {"MPO": "JPEG"}  # a JPEG with more pictures behind the first


def reencode_image(
    data: bytes,
    *,
    size: int | None = None,
    resize_mode: Literal["shorter", "longer"] = "shorter",
    image_format: Literal["webp", "jpeg", "png", "keep"] = "keep",
    quality: int = 90,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> bytes:
    """The image at no more than `size` and in the format asked for.

    The very bytes come back if they are both already. Otherwise the image is decoded by
    `decode_image`: upright, RGB, transparency over white, without metadata.

    Args:
        data: The bytes of a JPEG, PNG, WebP, GIF (first frame) or BMP file.
        size: Pixels of the side named by `resize_mode`; smaller images are never enlarged, and
            the aspect stays to within a pixel.
        resize_mode: Which side `size` means.
        image_format: `keep` keeps that of the file.
        quality: 1 to 100, of JPEG and WebP, which is lossy.
        max_pixels: Larger images are refused before any pixel is decoded.

    Raises:
        DataError: If the bytes are no such image, exceed `max_pixels`, or are of a format that
            shards do not hold.
    """
    found, width, height = _header(data)
    wanted = found if image_format == "keep" else image_format.upper()
    if wanted not in _STORABLE:
        message = f"a {found} file, which shards do not hold; choose --format webp, jpeg or png"
        raise DataError(message)
    if wanted == found and _target((width, height), size, resize_mode) == (width, height):
        return data
    image = Image.fromarray(decode_image(data, max_pixels=max_pixels))
    target = _target(image.size, size, resize_mode)
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, wanted, **({} if wanted == "PNG" else {"quality": quality}))
    return buffer.getvalue()


def _header(data: bytes) -> tuple[str, int, int]:
    """Format, width and height as they are stored."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=(*_STORABLE, "GIF", "BMP"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        message = f"not a readable image ({type(error).__name__}: {error})"
        raise DataError(message) from error
    found = str(image.format)
    return _SAME.get(found, found), *image.size


def _target(image_size: tuple[int, int], size: int | None, resize_mode: str) -> tuple[int, int]:
    """Width and height that the image shall have."""
    side = min(image_size) if resize_mode == "shorter" else max(image_size)
    if size is None or side <= size:
        return image_size
    width, height = (max(1, round(pixels * size / side)) for pixels in image_size)
    return width, height
