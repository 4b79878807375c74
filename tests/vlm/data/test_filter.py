"""Each rule on samples made for it; the file that says which rows are kept."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.support import encoded, write_dataset
from vlm.cli.main import app
from vlm.config import load_config, validate_config
from vlm.data.filter import FilterConfig, FilterReport, build_filter, open_filter
from vlm.data.manifest import build_manifest, open_manifest
from vlm.data.samples import Sample
from vlm.data.write import write_shards
from vlm.errors import ConfigError, DataError
from vlm.preprocess import decode_picture

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs/data/filter.yaml"


def picture(seed: int, *, width: int = 64, height: int = 64, image_format: str = "PNG") -> bytes:
    """Smooth random colours; every seed another image."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return encoded(image, image_format)


def sample(number: int, *, text: str = "", image: bytes = b"", **metadata: Any) -> Sample:
    return Sample(
        key=f"s{number:03d}",
        image=image or picture(number),
        text=text or f"picture number {number}",
        metadata=metadata,
    )


def write(folder: Path, samples: Sequence[Sample]) -> None:
    write_shards(samples, folder, prefix="part", samples_per_shard=3)
    build_manifest(folder)


def filtered(
    folder: Path, samples: Sequence[Sample] = (), *, workers: int = 1, **rules: Any
) -> tuple[list[int], dict[str, int]]:
    """Rows that are kept, and what each rule drops."""
    if samples:
        write(folder, samples)
    report = built(folder, workers=workers, **rules)
    manifest = open_manifest(folder)
    rows = open_filter(folder, "default", manifest)
    assert report.num_kept == len(rows)
    return rows.tolist(), report.dropped


def built(folder: Path, *, workers: int = 1, **rules: Any) -> FilterReport:
    config = validate_config(FilterConfig, rules, source="test")
    return build_filter(folder, config, decode=decode_picture, workers=workers)


def test_without_rules_what_can_be_decoded_is_kept(tmp_path: Path) -> None:
    samples = [sample(0), sample(1, image=picture(1)[:90]), sample(2)]
    assert filtered(tmp_path, samples) == ([0, 2], {"undecodable": 1})


def test_a_sample_with_bad_json_is_undecodable(tmp_path: Path) -> None:
    write(tmp_path, [sample(0), sample(1, mark="XXXX"), sample(2)])
    (shard,) = tmp_path.glob("*.tar")
    shard.write_bytes(shard.read_bytes().replace(b'{"mark": "XXXX"}', b'{"mark": XXXXXX}'))
    build_manifest(tmp_path)
    assert filtered(tmp_path) == ([0, 2], {"undecodable": 1})


def test_sides_and_aspects_on_their_bounds_are_kept(tmp_path: Path) -> None:
    sizes = [(20, 60), (60, 20), (19, 30), (20, 61), (19, 60)]
    samples = [
        sample(n, image=picture(n, width=width, height=height))
        for n, (width, height) in enumerate(sizes)
    ]
    kept, dropped = filtered(tmp_path, samples, min_side=20, max_aspect=3)
    assert kept == [0, 1]
    assert dropped == {"undecodable": 0, "min_side": 2, "max_aspect": 2}


def test_captions_have_words_not_punctuation(tmp_path: Path) -> None:
    texts = ["a cat", "a — cat !", "a red cat", "a red cat sat", "one two three four five"]
    samples = [sample(n, text=text) for n, text in enumerate(texts)]
    kept, dropped = filtered(tmp_path, samples, min_words=3, max_words=4)
    assert kept == [2, 3]
    assert dropped == {"undecodable": 0, "min_words": 2, "max_words": 1}


def test_an_image_under_too_many_captions_is_dropped(tmp_path: Path) -> None:
    shared = picture(0)
    samples = [
        sample(0, image=shared, text="one"),
        sample(1, image=shared, text="two"),
        sample(2, image=shared, text="TWO "),  # the same caption
        sample(3),
        sample(4, image=shared, text="three"),
    ]
    assert filtered(tmp_path, samples, max_captions_per_image=3)[0] == [0, 1, 2, 3, 4]
    kept, dropped = filtered(tmp_path, max_captions_per_image=2)
    assert (kept, dropped["max_captions_per_image"]) == ([3], 4)


def test_a_caption_under_too_many_images_is_dropped(tmp_path: Path) -> None:
    samples = [sample(n, text="a logo") for n in range(3)]
    samples += [sample(3, text="a logo", image=picture(0)), sample(4)]
    assert filtered(tmp_path, samples, max_images_per_caption=3)[0] == [0, 1, 2, 3, 4]
    kept, dropped = filtered(tmp_path, max_images_per_caption=2)
    assert (kept, dropped["max_images_per_caption"]) == ([4], 4)


NGRAM_TEXTS = ["a red cat", "a red dog", "A red, cat!", "cat red", "a red zebra"]
# unigrams: red 5, a 4, cat 3, dog 1, zebra 1; bigrams: a red 4, red cat 2, the others 1


@pytest.mark.parametrize(("least", "rows"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2])])
def test_captions_with_rare_unigrams_or_bigrams_are_dropped(
    tmp_path: Path, least: int, rows: list[int]
) -> None:
    samples = [sample(n, text=text) for n, text in enumerate(NGRAM_TEXTS)]
    kept, dropped = filtered(tmp_path, samples, min_ngram_count=least)
    assert (kept, dropped["min_ngram_count"]) == (rows, 5 - len(rows))


@pytest.mark.parametrize(
    # The fifth most frequent occurs twice, the sixth once, as do all others: ties are inside.
    ("most", "rows"),
    [(5, [0, 2]), (6, [0, 1, 2, 3, 4]), (1000, [0, 1, 2, 3, 4])],
)
def test_captions_outside_the_most_frequent_ngrams_are_dropped(
    tmp_path: Path, most: int, rows: list[int]
) -> None:
    samples = [sample(n, text=text) for n, text in enumerate(NGRAM_TEXTS)]
    assert filtered(tmp_path, samples, max_ngrams=most)[0] == rows


def test_metadata_bounds_and_what_is_missing(tmp_path: Path) -> None:
    values: list[dict[str, Any]] = [{"p": 0.1}, {"p": 0.2}, {}, {"p": None}, {"p": "0.05"}]
    write(tmp_path, [sample(n, **value) for n, value in enumerate(values)])
    rule = {"field": "p", "max": 0.1}
    assert filtered(tmp_path, metadata=[rule]) == (
        [0, 2, 3, 4],
        {"undecodable": 0, "metadata.p": 1},
    )
    assert filtered(tmp_path, metadata=[{**rule, "missing": "drop"}])[0] == [0, 4]


def test_metadata_in_a_table_beside_the_shard_is_found(tmp_path: Path) -> None:
    write(tmp_path, [sample(0, score=1.0), sample(1), sample(2)])
    table = pa.table({"key": ["s000", "s001"], "score": [9.0, 2.0], "other": [0, 0]})
    pq.write_table(table, tmp_path / "part-000000.parquet")
    # The sample's own value comes first; s002 is in neither.
    rule = {"field": "score", "max": 2.0, "missing": "drop"}
    assert filtered(tmp_path, metadata=[rule])[0] == [0, 1]


def test_a_table_without_keys_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [sample(0)])
    pq.write_table(pa.table({"score": [1.0]}), tmp_path / "part-000000.parquet")
    with pytest.raises(DataError, match=r"part-000000.parquet: no column 'key'.*found score"):
        built(tmp_path, metadata=[{"field": "score", "max": 1}])


def test_a_field_that_no_sample_has_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [sample(0, punsafe=0.5)])
    with pytest.raises(DataError, match="no sample has metadata.punsave"):
        built(tmp_path, metadata=[{"field": "punsave", "max": 0.1}])


def test_of_equal_images_the_first_that_other_rules_leave_stays(tmp_path: Path) -> None:
    one, two = picture(100), picture(101)
    samples = [
        sample(0, image=one, text="short"),
        sample(1, image=one, text="a longer caption"),
        sample(2, image=two, text="a third caption"),
        sample(3, image=one, text="A longer  caption"),
        sample(4, image=two, text="a fourth caption"),
    ]
    kept, dropped = filtered(tmp_path, samples, exact_duplicates="image", min_words=2)
    assert kept == [1, 2]
    assert dropped == {"undecodable": 0, "min_words": 1, "exact_duplicates": 3}
    kept, dropped = filtered(tmp_path, exact_duplicates="image_and_caption")
    assert (kept, dropped["exact_duplicates"]) == ([0, 1, 2, 4], 1)


def test_images_that_look_alike_are_near_duplicates(tmp_path: Path) -> None:
    samples = [
        sample(0),
        sample(1),
        sample(2, image=picture(0, image_format="JPEG")),
        sample(3, image=picture(1, width=128, height=100)),
        sample(4),
    ]
    kept, dropped = filtered(tmp_path, samples, near_duplicates={})
    assert (kept, dropped["near_duplicates"]) == ([0, 1, 4], 2)
    exact, _ = filtered(tmp_path, exact_duplicates="image")
    assert exact == [0, 1, 2, 3, 4]


def test_evaluation_images_and_captions_are_not_trained_on(tmp_path: Path) -> None:
    shards, files = tmp_path / "shards", tmp_path / "files/inside"
    write(shards, [sample(1, text="a held-out caption")])
    files.mkdir(parents=True)
    (files / "any.jpg").write_bytes(picture(2, image_format="JPEG"))
    broken = picture(3)[:90]
    (files / "broken.png").write_bytes(broken)
    samples = [
        sample(0),
        sample(1),
        sample(2),
        sample(3, text="A held-out caption"),
        sample(4, image=broken),
    ]
    folders = [str(shards), str(tmp_path / "files")]
    train = tmp_path / "train"
    kept, dropped = filtered(train, samples, decontaminate=folders)
    assert kept == [0, 3]
    assert dropped == {"undecodable": 1, "decontaminate": 2}
    assert filtered(train, decontaminate=folders, decontaminate_likeness=None)[0] == [0, 2, 3]
    kept, dropped = filtered(train, decontaminate=folders, decontaminate_captions=True)
    assert (kept, dropped["decontaminate_captions"]) == ([0], 1)


def test_an_evaluation_folder_without_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [sample(0)])
    (tmp_path / "empty").mkdir()
    config = FilterConfig(decontaminate=(tmp_path / "empty",))
    read: list[str] = []
    with pytest.raises(DataError, match="decontaminate: .*empty: neither .tar shards nor images"):
        build_filter(
            tmp_path,
            config,
            decode=decode_picture,
            progress=lambda stage, _done, _all: read.append(stage),
        )
    assert not read  # it was found wrong only after the whole dataset was read


EVERYTHING: dict[str, Any] = {
    "min_side": 8,
    "max_images_per_caption": 4,
    "min_ngram_count": 2,
    "exact_duplicates": "image",
    "near_duplicates": {"max_colour_difference": 255},
}


def test_processes_write_the_bytes_that_one_writes(tmp_path: Path) -> None:
    write_dataset(tmp_path, 40)
    rules = {**EVERYTHING, "decontaminate": [str(tmp_path / "eval")]}
    write(tmp_path / "eval", [sample(0)])
    written = []
    for workers in (1, 2):
        rows, dropped = filtered(tmp_path, workers=workers, **rules)
        assert 0 < len(rows) < 40
        assert dropped["near_duplicates"] > 0
        files = sorted((tmp_path / "filters").iterdir())  # no draft is left
        assert [path.name for path in files] == ["default.json", "default.npy"]
        written.append([path.read_bytes() for path in files])
    assert written[0] == written[1]


def test_the_mark_tells_what_was_done_and_the_rows_are_mapped(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, 20)
    report = built(tmp_path, name="some", exact_duplicates="image")
    rows = open_filter(tmp_path, "some", manifest)
    assert isinstance(rows, np.memmap)
    assert np.all(np.diff(rows) > 0)
    tree = json.loads((tmp_path / "filters/some.json").read_text())
    assert tree["fingerprint"] == manifest.fingerprint
    assert (tree["num_samples"], tree["num_kept"]) == (20, len(rows))
    assert tree["dropped"] == report.dropped
    assert FilterConfig.model_validate(tree["config"]).exact_duplicates == "image"


def test_a_filter_of_a_changed_dataset_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [sample(n) for n in range(4)])
    built(tmp_path)
    write(tmp_path, [sample(n) for n in range(5)])
    with pytest.raises(DataError, match=r"built for a dataset of fingerprint .*vlm data filter"):
        open_filter(tmp_path, "default", open_manifest(tmp_path))


def test_a_missing_or_damaged_filter_is_refused(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, 12)
    with pytest.raises(DataError, match="no such filter, there are: none; run `vlm data filter"):
        open_filter(tmp_path, "default", manifest)
    path = built(tmp_path).path
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:-1] + b"\x01", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            open_filter(tmp_path, "default", manifest)
    path.unlink()
    with pytest.raises(DataError, match="missing or damaged"):
        open_filter(tmp_path, "default", manifest)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(DataError, match="default.json: damaged"):
        open_filter(tmp_path, "default", manifest)
    with pytest.raises(DataError, match="there are: default"):
        open_filter(tmp_path, "other", manifest)


def test_a_filter_that_keeps_nothing_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    write_dataset(tmp_path, 12)
    with pytest.raises(DataError, match="keep none of 12 samples; min_side drops most, 12"):
        built(tmp_path, min_side=5000)
    assert list((tmp_path / "filters").iterdir()) == []


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"min_sides": 3}, "min_sides: no such key; did you mean 'min_side'"),
        ({"min_side": 0}, "min_side: .*found 0"),
        ({"name": "../up"}, "name: .*found '../up'"),
        ({"min_words": 5, "max_words": 4}, "min_words=5 is above max_words=4"),
        ({"metadata": [{"field": "p"}]}, "metadata.0: .*'p': at least one of min and max"),
        ({"metadata": [{"field": "p", "min": 1}, {"field": "p", "max": 2}]}, "'p' comes twice"),
        ({"near_duplicates": {"max_distance": 40}}, "near_duplicates.max_distance: .*found 40"),
        ({"exact_duplicates": "text"}, "exact_duplicates: .*found 'text'"),
        ({"decontaminate_captions": True}, "needs folders in decontaminate"),
    ],
)
def test_wrong_configurations_name_key_and_value(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_config(FilterConfig, rules, source="test")


def test_the_config_in_the_repository_is_that_of_align() -> None:
    config = load_config(FilterConfig, CONFIG, [])
    assert (config.name, config.min_side, config.max_aspect) == ("align", 200, 3)
    assert (config.max_captions_per_image, config.max_images_per_caption) == (1000, 10)
    assert (config.min_words, config.max_words, config.max_ngrams) == (3, 20, 100_000_000)


def test_the_verb_prints_a_table_of_rules(tmp_path: Path) -> None:
    write_dataset(tmp_path, 32)
    verb = ["data", "filter", str(tmp_path), "--config", str(CONFIG), "--workers", "1"]
    done = CliRunner().invoke(app, [*verb, "min_side=32", "exact_duplicates=image"])
    assert done.exit_code == 0, done.output
    kept = len(open_filter(tmp_path, "align", open_manifest(tmp_path)))
    assert "exact_duplicates" in done.output
    assert f"{kept} of 32 samples kept" in done.output
    assert "reading shards 4/4" in done.output
    refused = CliRunner().invoke(app, verb)
    assert isinstance(refused.exception, DataError)
