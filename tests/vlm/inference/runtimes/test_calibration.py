from pathlib import Path

import numpy as np
import pytest

from tests.support import write_dataset
from vlm.errors import DataError
from vlm.inference.runtimes import calibration_pairs, drawn_calibration
from vlm.preprocess import ImageConfig, TokenizerConfig

IMAGE = ImageConfig(size=32)


def test_drawn_pairs_are_many_different_and_always_the_same() -> None:
    pairs = drawn_calibration(IMAGE, count=60)
    assert pairs.pixels.shape == (60, 3, 32, 32)
    assert len(set(pairs.texts)) == 60
    assert len({image.tobytes() for image in pairs.pixels}) == 60
    again = drawn_calibration(IMAGE, count=60)
    assert np.array_equal(again.pixels, pairs.pixels)
    assert again.texts == pairs.texts
    assert drawn_calibration(IMAGE, count=60, seed=1).texts != pairs.texts


def test_a_drawn_picture_has_the_colours_of_its_caption() -> None:
    pairs = drawn_calibration(IMAGE, count=1320)
    number = pairs.texts.index("a large red square on a blue ground")
    colours = {tuple(pixel) for pixel in pairs.pixels[number].reshape(3, -1).T.tolist()}
    assert {(255, 0, 0), (0, 0, 255)} <= colours


def test_halves_share_no_pair_and_lose_none() -> None:
    pairs = drawn_calibration(IMAGE, count=7)
    compared, ranges = pairs.halves()
    assert sorted(compared.texts + ranges.texts) == sorted(pairs.texts)
    assert (len(compared.pixels), len(ranges.pixels)) == (4, 3)
    assert compared.origin == "4 of 7 drawn pairs"


def test_batches_hold_every_image_and_every_text_once() -> None:
    pairs = drawn_calibration(IMAGE, count=7)
    assert [len(batch) for batch in pairs.pixel_batches(batch=3)] == [3, 3, 1]
    token_ids = pairs.token_ids(TokenizerConfig(context_length=20), batch=3)
    assert [len(batch) for batch in token_ids] == [3, 3, 1]
    assert all((batch[:, -1] != 0).any() for batch in token_ids)  # trimmed to the longest


def test_pairs_of_shards_spread_over_them_without_repeating_a_caption(tmp_path: Path) -> None:
    write_dataset(tmp_path, 48)  # 16 captions, three times
    pairs = calibration_pairs(tmp_path, IMAGE, count=100)
    assert len(pairs.texts) == len(set(pairs.texts)) == len(pairs.pixels) == 16
    assert len(calibration_pairs(tmp_path, IMAGE, count=5).texts) == 5


def test_shards_of_too_few_captions_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, 3)
    with pytest.raises(DataError, match="3 different captions, and calibration needs at least 4"):
        calibration_pairs(tmp_path, IMAGE)
