"""Images are changed where they have to be, and left alone where not."""

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support import drawing, encoded
from vlm.errors import DataError
from vlm.preprocess import decode_image, reencode_image


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [None, 32, 100])
def test_an_image_that_fits_keeps_its_bytes(kind: Any, size: int | None) -> None:
    data = encoded(drawing("red", "circle"), kind)
    assert reencode_image(data, size=size) is data
    assert reencode_image(data, size=size, image_format=kind.lower(), quality=1) is data


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    size=st.integers(1, 100),
    longer=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_the_side_is_as_asked_the_aspect_stays_and_nothing_grows(
    width: int, height: int, size: int, longer: bool
) -> None:
    data = encoded(Image.new("RGB", (width, height)))
    mode: Any = "longer" if longer else "shorter"
    found = opened(reencode_image(data, size=size, resize_mode=mode)).size
    side = (max if longer else min)(width, height)
    assert (max if longer else min)(found) == min(side, size)
    scale = min(1, size / side)
    assert found[0] == pytest.approx(width * scale, abs=1)
    assert found[1] == pytest.approx(height * scale, abs=1)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_the_format_is_as_asked(kind: Any) -> None:
    image = drawing("red", "circle")
    for source in ("BMP", "GIF", "PNG", "JPEG", "WEBP"):
        assert opened(reencode_image(encoded(image, source), image_format=kind)).format == (
            kind.upper()
        )


def test_png_made_of_another_format_has_its_very_pixels() -> None:
    data = encoded(drawing("blue", "square"), "JPEG")
    found = reencode_image(data, image_format="png")
    assert np.array_equal(decode_image(found), decode_image(data))


def test_quality_decides_about_the_size_of_the_file() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise)
    kinds: tuple[Any, ...] = ("jpeg", "webp")
    for kind in kinds:
        small, large = (
            len(reencode_image(data, image_format=kind, quality=quality)) for quality in (20, 95)
        )
        assert small < large / 2


def test_orientation_is_applied_when_an_image_is_encoded_anew() -> None:
    image = Image.new("RGB", (80, 40), "red")
    image.paste("blue", (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn by 90 degrees clockwise to see it
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95)
    found = opened(reencode_image(buffer.getvalue(), size=20, image_format="png"))
    assert found.size == (20, 40)
    assert found.getpixel((10, 5)) == pytest.approx((0, 0, 254), abs=8)
    assert found.getpixel((10, 35)) == pytest.approx((254, 0, 0), abs=8)
    assert not found.getexif()


def test_what_shards_do_not_hold_needs_a_format() -> None:
    data = encoded(drawing("red", "circle"), "GIF")
    with pytest.raises(DataError, match="a GIF file, which shards do not hold; choose --format"):
        reencode_image(data)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="not a readable image"):
        reencode_image(data)


def test_a_torn_image_that_has_to_change_is_refused() -> None:
    data = encoded(drawing("red", "circle", size=200), "PNG")
    with pytest.raises(DataError, match="not a readable image"):
        reencode_image(data[: len(data) // 2], size=100)


def test_an_image_over_the_limit_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.new("RGB", (100, 100)))
    with pytest.raises(DataError, match="over the limit of 9999"):
        reencode_image(data, size=10, max_pixels=9999)
