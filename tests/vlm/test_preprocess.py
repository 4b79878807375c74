import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
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
    stack_images,
    trim_padding,
)
from vlm.preprocess.byte_pairs import merged_pieces


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(
    width=st.integers(8, 200),
    height=st.integers(8, 200),
    mode=st.sampled_from(["shortest", "squash"]),
)
@settings(max_examples=100, deadline=None)
def test_pixels_are_those_of_open_clips_own_transform_but_for_rounding(
    width: int, height: int, mode: str
) -> None:
    config = ImageConfig.model_validate({"size": 24, "resize_mode": mode})
    image = noise(width, height)
    transform = image_transform(
        24, is_train=False, mean=config.mean, std=config.std, resize_mode=mode
    )
    expected = transform(image)
    found = normalise_images(torch.from_numpy(resize_image(image, config))[None], config)[0]
    levels = (found - expected).abs() * 255 * torch.tensor(config.std)[:, None, None]
    # Both round to gray levels after each of two passes, by weights of as many bits as the
    # processor has instructions for; what is enlarged may so differ by two (52 x 10, on AVX2).
    assert levels.max() <= 2.01
    assert (levels > 1.01).float().mean() < 0.005


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP", "GIF", "JPEG"])
def test_the_allowed_formats_decode_to_rgb(image_format: str) -> None:
    image = decode_image(encoded(drawing("red", "square"), image_format))
    assert image.shape == (32, 32, 3)
    red, green, blue = image[16, 16].tolist()
    assert red > 240 > 20 > max(green, blue)


def test_other_formats_are_refused_whatever_they_are_called() -> None:
    with pytest.raises(DataError, match="allowed formats are JPEG"):
        decode_image(encoded(drawing("red", "square"), "TIFF"))


def test_transparent_pixels_lie_over_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    assert flatten_image(image).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(image))[0, 0].tolist() == [255, 255, 255]


def test_gray_levels_of_16_bits_are_those_of_8() -> None:
    """All over 255 were cut to white."""
    gray = np.arange(64, dtype=np.uint16).reshape(8, 8) * 4
    buffer = io.BytesIO()
    Image.fromarray(257 * gray).save(buffer, "PNG")
    assert Image.open(buffer).mode.startswith("I")
    np.testing.assert_array_equal(decode_image(buffer.getvalue())[..., 1], gray)
    buffer = io.BytesIO()
    Image.fromarray(257 * gray).save(buffer, "PNG", transparency=257 * 8)
    gray[gray == 8] = 255  # transparent ones are white, which they were not
    np.testing.assert_array_equal(decode_image(buffer.getvalue())[..., 1], gray)


def test_exif_orientation_is_honoured() -> None:
    image = Image.new("RGB", (8, 4), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).shape == (8, 4, 3)


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded() -> None:
    """Two hundred scans over 49 megapixels, in 207 KB, took a minute, and more take days."""
    buffer = io.BytesIO()
    Image.new("L", (2048, 2048), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    sound = data[:-2] + 20 * last + data[-2:]
    assert decode_image(sound).shape == (2048, 2048, 3)  # it is not large
    with pytest.raises(DataError, match="scans, at most 16 at its size; save it again"):
        decode_image(sound, max_pixels=2048 * 2048)
    scans = data.count(b"\xff\xda") + 300
    with pytest.raises(DataError, match=f"the JPEG has {scans} scans, at most 190 at its size"):
        decode_image(data[:-2] + 300 * last + data[-2:])


@pytest.mark.parametrize(
    ("side", "runs_of_a_line", "fits"), [(512, 512, True), (1024, 1024, False), (2048, 1, False)]
)
def test_a_large_bmp_of_runs_is_refused_before_it_is_decoded(
    side: int, runs_of_a_line: int, fits: bool
) -> None:
    """Pillow decodes run after run in Python; 28 MB of runs of one pixel took eight seconds.

    And the end of a line fills it up pixel by pixel: 29 KB for 49 megapixels took six.
    """
    buffer = io.BytesIO()
    Image.new("P", (side, side)).save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[30:34] = (1).to_bytes(4, "little")  # the compression: runs of 8 bits
    begin = int.from_bytes(data[10:14], "little")
    line = runs_of_a_line * b"\x01\x00" + b"\x00\x00"
    runs = bytes(data[:begin]) + side * line + b"\x00\x01"
    if fits:
        assert decode_image(runs).shape == (side, side, 3)
    else:
        with pytest.raises(DataError, match="run-length coded and has .* save it as PNG"):
            decode_image(runs)


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
    assert image.shape[2] == 3


def test_token_ids_are_padded_cut_and_trimmed() -> None:
    tokenize = build_tokenizer(TokenizerConfig(context_length=8))
    ids = tokenize(["a cat", "one two three four five six seven eight nine"])
    assert ids.shape == (2, 8)
    end = int(ids.max())
    assert (ids == end).sum(dim=1).tolist() == [1, 1]  # the end mark survives the cut
    assert trim_padding(ids[:1]).shape == (1, 4)  # start, a, cat, end
    assert trim_padding(torch.zeros(0, 8, dtype=torch.int64)).shape == (0, 1)


def photograph(width: int, height: int) -> Image.Image:
    """Smooth shapes with edges: what JPEG is made for, unlike noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 100 * np.sin(x / (9 + 7 * n) + n) * np.cos(y / (14 + 5 * n)) for n in range(3)]
    pixels = np.stack(waves, axis=-1)
    pixels[(x // 40 + y // 30) % 2 == 0] *= 0.7
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("quality", [50, 95])
def test_a_jpeg_decodes_to_pillows_pixels(mode: str, quality: int) -> None:
    buffer = io.BytesIO()
    photograph(123, 77).convert(mode).save(buffer, "JPEG", quality=quality)
    expected = np.asarray(Image.open(buffer).convert("RGB"))
    assert np.array_equal(decode_image(buffer.getvalue()), expected)


def test_a_cmyk_jpeg_is_decoded_by_pillow() -> None:
    buffer = io.BytesIO()
    photograph(40, 30).convert("CMYK").save(buffer, "JPEG")
    expected = np.asarray(Image.open(buffer).convert("RGB"))
    assert np.array_equal(decode_image(buffer.getvalue()), expected)


@pytest.mark.parametrize(
    ("min_side", "expected"), [(None, 600), (301, 600), (300, 300), (80, 150), (1, 75)]
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_is_large_enough(
    min_side: int | None, expected: int
) -> None:
    buffer = io.BytesIO()
    photograph(803, 600).save(buffer, "JPEG", quality=90)
    assert decode_image(buffer.getvalue(), min_side=min_side).shape[0] == expected


def test_reduced_decoding_stays_near_the_pixels_of_full_decoding() -> None:
    buffer = io.BytesIO()
    photograph(900, 640).save(buffer, "JPEG", quality=90)
    config = ImageConfig(size=64, jpeg_margin=3)
    assert config.decode_side() == 192
    full = resize_image(decode_image(buffer.getvalue()), config)
    small = decode_image(buffer.getvalue(), min_side=config.decode_side())
    assert small.shape[0] == 320
    difference = np.abs(resize_image(small, config).astype(int) - full)
    assert difference.mean() < 2


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (7, 900)])
def test_images_of_any_shape_become_squares(size: tuple[int, int]) -> None:
    for mode in ("shortest", "squash"):
        config = ImageConfig.model_validate({"size": 16, "resize_mode": mode})
        assert resize_image(Image.new("RGB", size, "red"), config)[:, 8, 8].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1400, 20), (16, 1122)])
def test_the_ends_of_a_very_long_image_are_dropped_before_they_are_scaled(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one of 1 x 50,000,000 pixels they took 300 GB."""
    picture, config = noise(*size), ImageConfig(size=16)
    found = resize_image(picture, config).astype(int)
    monkeypatch.setattr("vlm.preprocess.images._MAX_ASPECT", 10_000)
    whole = resize_image(picture, config).astype(int)
    assert np.abs(found - whole).max() <= 1


def test_a_stack_of_images_is_their_batch_with_channels_last_in_memory() -> None:
    images = [resize_image(noise(30 + n, 20), ImageConfig(size=16)) for n in range(3)]
    batch = stack_images(images)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch.numpy(), np.stack(images))


REFERENCE = SimpleTokenizer(context_length=12)
OURS = build_tokenizer(TokenizerConfig(context_length=12))


@given(captions=st.lists(st.text(max_size=60) | st.text(st.characters(codec="ascii")), max_size=4))
@settings(deadline=None, max_examples=200)
def test_token_ids_are_those_of_open_clips_tokenizer(captions: list[str]) -> None:
    expected = REFERENCE(captions) if captions else torch.zeros(0, 12, dtype=torch.int64)
    assert torch.equal(OURS(captions), expected)


@pytest.mark.parametrize(
    "caption",
    ["", "  a   Photo\tof\na CAT ", "Tom &amp; Jerry &lt;3", "caf\u00e9 na\u00efve",
     "it's 5,000 o'clock!!",
     "<|startoftext|> <end_of_text>", "\ufb01sh \u201cquoted\u201d", "word " * 50],
)  # fmt: skip
def test_token_ids_of_odd_captions_are_those_of_open_clip(caption: str) -> None:
    assert torch.equal(OURS([caption]), REFERENCE([caption]))


def test_many_odd_words_do_not_grow_the_memory_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlm.preprocess.tokens._WORDS_REMEMBERED", 10)
    tokenize = build_tokenizer(TokenizerConfig(context_length=12))
    captions = [f"word{number}x{number}" for number in range(50)]
    assert torch.equal(tokenize(captions), REFERENCE(captions))
    remembered = tokenize.args[2]  # type: ignore[attr-defined]  # of the partial that it is
    assert len(remembered) <= 10


@given(letters=st.text("ab!", min_size=1, max_size=40) | st.text("etaoinshr", min_size=1))
@settings(deadline=None)
def test_pieces_of_a_word_are_those_of_open_clip(letters: str) -> None:
    expected = REFERENCE.bpe(letters).split(" ")
    assert merged_pieces(REFERENCE.bpe_ranks, letters) == expected


def test_a_long_word_and_the_marks_are_tokenized_as_by_open_clip() -> None:
    """Pairs were looked for anew after each merge: a word of 2,000 letters took a second."""
    generator = np.random.default_rng(0)
    word = "".join(generator.choice([*"etaoinshrdlu"], 400))
    whole = build_tokenizer(TokenizerConfig(context_length=400))
    assert torch.equal(whole([word]), SimpleTokenizer(context_length=400)([word]))
    assert whole([word * 40]).shape == (1, 400)  # 16,000 letters
    marks = ["<start_of_text> a <end_of_text>"] * 2
    assert torch.equal(OURS(marks), REFERENCE(marks))


def test_trimming_cuts_no_end_mark_of_a_caption_with_the_token_0_inside() -> None:
    ids = build_tokenizer(TokenizerConfig(context_length=12))(["wow !\u2605", "wow"])
    (length,) = [row.tolist().index(49407) + 1 for row in ids[:1]]
    assert 0 in ids[0, :length].tolist()
    assert torch.equal(trim_padding(ids), ids[:, :length])
    assert trim_padding(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 1)
    assert trim_padding(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 1)
