import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image

from tests.support import drawing, encoded
from vlm.errors import DataError
from vlm.preprocess import (
    ImageConfig,
    TokenizerConfig,
    build_tokenizer,
    decode_image,
    flatten_image,
    normalise_images,
    resize_image,
    trim_padding,
)


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(
    width=st.integers(8, 90),
    height=st.integers(8, 90),
    mode=st.sampled_from(["shortest", "squash"]),
)
@settings(max_examples=30, deadline=None)
def test_pixels_equal_open_clips_own_transform(width: int, height: int, mode: str) -> None:
    config = ImageConfig.model_validate({"size": 24, "resize_mode": mode})
    image = noise(width, height)
    transform = image_transform(
        24, is_train=False, mean=config.mean, std=config.std, resize_mode=mode
    )
    expected = transform(image)
    found = normalise_images(torch.from_numpy(resize_image(image, config))[None], config)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP", "GIF", "JPEG"])
def test_the_allowed_formats_decode_to_rgb(image_format: str) -> None:
    image = decode_image(encoded(drawing("red", "square"), image_format))
    assert (image.mode, image.size) == ("RGB", (32, 32))
    red, green, blue = np.asarray(image)[16, 16].tolist()
    assert red > 240 > 20 > max(green, blue)


def test_other_formats_are_refused_whatever_they_are_called() -> None:
    with pytest.raises(DataError, match="allowed formats are JPEG"):
        decode_image(encoded(drawing("red", "square"), "TIFF"))


def test_transparent_pixels_lie_over_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    assert flatten_image(image).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(image)).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_honoured() -> None:
    image = Image.new("RGB", (8, 4), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).size == (4, 8)


@pytest.mark.parametrize("side", [8_000, 20_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    bomb = encoded(Image.new("1", (side, side)))
    assert len(bomb) < 100_000
    with pytest.raises(DataError, match="over the limit of 50000000"):
        decode_image(bomb)


@given(data=st.binary(max_size=200))
@settings(deadline=None)
def test_garbage_is_a_data_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(DataError):
        decode_image(data)


@given(cut=st.integers(0, 400), flip=st.integers(0, 400), value=st.integers(0, 255))
@settings(deadline=None, max_examples=60)
def test_a_damaged_file_decodes_or_is_a_data_error(cut: int, flip: int, value: int) -> None:
    data = bytearray(encoded(noise(16, 16), "JPEG"))
    data[flip % len(data)] = value
    try:
        image = decode_image(bytes(data[: len(data) - cut % len(data)]))
    except DataError:
        return
    assert image.mode == "RGB"


def test_token_ids_are_padded_cut_and_trimmed() -> None:
    tokenize = build_tokenizer(TokenizerConfig(context_length=8))
    ids = tokenize(["a cat", "one two three four five six seven eight nine"])
    assert ids.shape == (2, 8)
    end = int(ids.max())
    assert (ids == end).sum(dim=1).tolist() == [1, 1]  # the end mark survives the cut
    assert trim_padding(ids[:1]).shape == (1, 4)  # start, a, cat, end
    assert trim_padding(torch.zeros(0, 8, dtype=torch.int64)).shape == (0, 1)
