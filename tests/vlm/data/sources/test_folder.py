import json
import os
from pathlib import Path

import pytest

from tests.support import drawn_samples, reasons_of, samples_of
from vlm.data.sources.folder import open_folder
from vlm.errors import DataError


def test_a_folder_gives_captions_beside_images_or_class_names(tmp_path: Path) -> None:
    images = [s.image for s in drawn_samples(3)]
    (tmp_path / "red_fox").mkdir()
    (tmp_path / "red_fox" / "1.png").write_bytes(images[0])
    (tmp_path / "a.b.PNG").write_bytes(images[1])
    (tmp_path / "a.b.txt").write_text("  a caption\n", encoding="utf-8")
    found = samples_of(open_folder(tmp_path))
    assert [(s.key, s.text) for s in found] == [("a_b", "a caption"), ("red_fox_1", "red fox")]
    assert found[0].image == images[1]
    assert found[1].metadata == {"source": "red_fox/1.png"}


def test_images_whose_names_give_one_key_get_numbers(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "c").mkdir()
    for name in ("a/b.jpg", "a/b.png", "c/a_b_2.png", "a_b_2.png", "a_b.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a_b.txt").write_text("x")
    (tmp_path / "a_b_2.txt").write_text("x")
    keys = {s.metadata["source"]: s.key for s in samples_of(open_folder(tmp_path))}
    assert keys == {
        "a/b.jpg": "a_b",
        "a/b.png": "a_b_3",
        "a_b.png": "a_b_4",
        "a_b_2.png": "a_b_2",
        "c/a_b_2.png": "c_a_b_2",
    }


def test_the_facts_of_a_folder_change_with_any_image_or_caption(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"1")
    (tmp_path / "x.txt").write_text("a")
    facts = [open_folder(tmp_path).facts()]
    assert facts == [open_folder(tmp_path).facts()]
    (tmp_path / "x.txt").write_text("ab")
    facts.append(open_folder(tmp_path).facts())
    os.utime(tmp_path / "x.png", ns=(0, 1))
    facts.append(open_folder(tmp_path).facts())
    assert len({json.dumps(tree) for tree in facts}) == 3


def test_an_image_without_caption_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    source = open_folder(tmp_path)
    assert source.where(0) == str(tmp_path / "x.png")
    assert "no caption; put it into x.txt" in reasons_of(source)["x"]


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "x.png").symlink_to(tmp_path / "nowhere")
    assert "No such file" in reasons_of(open_folder(tmp_path))["red_x"]


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images; looked for .webp"):
        open_folder(tmp_path)


def test_a_caption_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "x.txt").write_bytes(b"\xff\xff")
    assert "x.txt is not UTF-8" in reasons_of(open_folder(tmp_path))["x"]
