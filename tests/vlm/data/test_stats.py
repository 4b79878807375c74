import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import drawing, encoded, write_dataset
from vlm.data.languages import UNSURE, language_of
from vlm.data.manifest import build_manifest
from vlm.data.samples import Sample
from vlm.data.stats import DatasetStats, measure_stats
from vlm.data.stats_page import stats_page, stats_rows
from vlm.data.write import write_shards
from vlm.errors import DataError
from vlm.preprocess import decode_picture

DECODE = partial(decode_picture, max_pixels=10_000)
TORN = b"\x89PNG\r\n\x1a\n"


def measured(folder: Path, **settings: Any) -> DatasetStats:
    generator = np.random.default_rng(0)
    return measure_stats(folder, decode=DECODE, generator=generator, **settings)


def odd_dataset(folder: Path) -> None:
    """Nine samples: two equal pairs, an empty caption, a broken image, one over the limit."""
    wide = encoded(Image.new("RGB", (60, 20), "red"))
    tall = encoded(Image.new("RGB", (10, 40), "blue"), "JPEG")
    circle = encoded(drawing("green", "circle"))
    samples = [
        Sample(key="a", image=wide, text="a wide red box", metadata={"year": 1}),
        Sample(key="b", image=wide, text="a wide red box"),
        Sample(key="c", image=wide, text="something else"),
        Sample(key="d", image=tall, text="<b>tall & blue</b>", metadata={"year": 2, "tags": []}),
        Sample(key="e", image=circle, text=""),
        Sample(key="f", image=TORN, text="lost"),
        Sample(key="g", image=encoded(Image.new("RGB", (200, 200))), text="too large"),
    ]
    write_shards(samples, folder, prefix="odd", samples_per_shard=4)
    build_manifest(folder)


def test_the_figures_are_those_of_the_samples(tmp_path: Path) -> None:
    odd_dataset(tmp_path)
    tree = measured(tmp_path).tree
    assert (tree["num_samples"], tree["num_read"], tree["num_shards"]) == (7, 7, 2)
    assert (tree["num_unusable"], tree["num_empty_captions"]) == (2, 1)
    assert tree["duplicates"] == {"images": 2, "images_alike": 2, "captions": 1, "pairs": 1}
    assert tree["numbers"]["width"]["quantiles"] == {
        "0": 10, "0.05": pytest.approx(14.4), "0.25": 32, "0.5": 60, "0.75": 60, "0.95": 60,
        "1": 60,
    }  # fmt: skip
    assert tree["numbers"]["aspect"]["mean"] == pytest.approx((3 * 3 + 0.25 + 1) / 5)
    assert tree["numbers"]["caption_words"]["mean"] == pytest.approx((4 + 4 + 2 + 3 + 0) / 5)
    for spread in tree["numbers"].values():
        assert sum(spread["histogram"]["counts"]) == 5
    counts = {name: dict(pairs) for name, pairs in tree["counts"].items()}
    assert counts["formats"] == {"PNG": 4, "JPEG": 1}
    assert counts["captions"]["a wide red box"] == 2
    assert counts["words"]["red"] == 2
    assert counts["fields"] == {"year": 2, "tags": 1}
    assert sum(counts["unusable"].values()) == 2
    assert any("over the limit of 10000" in reason for reason in counts["unusable"])


def test_any_number_of_processes_finds_the_same(tmp_path: Path) -> None:
    write_dataset(tmp_path, 45)
    one, two = measured(tmp_path), measured(tmp_path, workers=2)
    assert one == two
    json.dumps(one.tree)


def test_a_limit_reads_samples_drawn_from_everywhere(tmp_path: Path) -> None:
    write_dataset(tmp_path, 200)
    some = measured(tmp_path, limit=50, num_pictures=10)
    assert some.tree["num_read"] == 50
    assert len(some.pictures) == 10
    numbers = [int(key[1:]) for key, _, _ in some.pictures]
    assert numbers == sorted(numbers)
    assert max(numbers) > 100
    assert measured(tmp_path, limit=50, num_pictures=10) == some
    assert ("samples read", "50 of 200") in stats_rows(some.tree)


def test_captions_cannot_inject_markup_into_the_page(tmp_path: Path) -> None:
    odd_dataset(tmp_path)
    page = stats_page(measured(tmp_path))
    assert "&lt;b&gt;tall &amp; blue&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "http" not in page  # nothing is loaded from anywhere
    assert page.count("data:image/webp;base64,") == 5
    assert Counter(page.split("<svg"))[""] == 0
    assert page.count("<svg") == 7


def test_a_dataset_without_one_good_sample_is_described_too(tmp_path: Path) -> None:
    samples = [Sample(key="a", image=TORN, text="lost")]
    write_shards(samples, tmp_path, prefix="bad", samples_per_shard=4)
    build_manifest(tmp_path)
    stats = measured(tmp_path)
    assert stats.tree["num_unusable"] == 1
    assert stats.tree["numbers"] == {}
    assert "not a readable image" in stats_page(stats)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not an indexed dataset"):
        measured(tmp_path)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a photo of a dog on the beach with a ball", "en"),
        ("ein Hund am Strand mit einem roten Ball", "de"),
        ("une pomme rouge sur la table de la cuisine", "fr"),
        ("犬が海辺で走っている写真", "ja"),
    ],
)
def test_sentences_tell_their_language(text: str, language: str) -> None:
    assert language_of(text) == language


def test_a_number_tells_no_language() -> None:
    assert language_of("1234") == UNSURE


def test_a_shard_changed_since_indexing_is_an_error_and_not_many_unusable_samples(
    tmp_path: Path,
) -> None:
    write_dataset(tmp_path, 20)
    one, other = (tmp_path / f"drawn-00000{number}.tar" for number in range(2))
    size = max(one.stat().st_size, other.stat().st_size)
    for path in (one, other):
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    build_manifest(tmp_path)
    one.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"drawn-000000\.tar: changed since indexing"):
        measured(tmp_path)
