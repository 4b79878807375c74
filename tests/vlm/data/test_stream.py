import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import drawn_samples, train_stream, write_dataset
from vlm.data.captions import CaptionConfig, choose_caption
from vlm.data.labels import label_ids
from vlm.data.manifest import Manifest, build_manifest
from vlm.data.reader import Reader
from vlm.data.samples import Sample
from vlm.data.stream import StreamConfig, TrainStream
from vlm.data.write import write_shards
from vlm.errors import DataError


def stream(
    manifest: Manifest,
    *,
    rank: int = 0,
    size: int = 1,
    ledger: Path | None = None,
    run_length: int = 1,
    **config: Any,
) -> TrainStream:
    settings = StreamConfig.model_validate({"group_field": "concept", **config})
    return train_stream(
        Reader(manifest, run_length=run_length),
        settings,
        seed=3,
        run_length=run_length,
        context_length=10,
        ledger=ledger,
        rank=rank,
        size=size,
    )


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_dataset(tmp_path, 31)


def test_batches_do_not_depend_on_threads_prefetch_or_cache(manifest: Manifest) -> None:
    tags: dict[str, Any] = {"captions": {"text": 0.2, "tags": 0.4, "text_and_tags": 0.4}}
    one = list(stream(manifest, threads=1, prefetch=1, cache_bytes=0, **tags).batches(0, 8))
    many = list(stream(manifest, threads=4, prefetch=6, **tags).batches(0, 8))
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.token_ids, b.token_ids)
        assert torch.equal(a.group_ids, b.group_ids)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_see_what_one_rank_sees(manifest: Manifest, size: int) -> None:
    captions: dict[str, Any] = {"captions": {"text": 0.5, "tags": 0.5}}
    whole = list(stream(manifest, **captions).batches(0, 5))
    parts = [
        list(stream(manifest, rank=r, size=size, **captions).batches(0, 5)) for r in range(size)
    ]
    for step, batch in enumerate(whole):
        for name in ("images", "token_ids", "sample_ids", "group_ids"):
            joined = torch.cat([getattr(part[step], name) for part in parts])
            assert torch.equal(joined, getattr(batch, name))


def test_a_stream_started_late_goes_on_where_the_other_was(manifest: Manifest) -> None:
    whole = list(stream(manifest).batches(0, 9))
    late = list(stream(manifest).batches(6, 9))
    assert [b.sample_ids.tolist() for b in late] == [b.sample_ids.tolist() for b in whole[6:]]


def test_equal_concepts_share_a_group_and_others_do_not(manifest: Manifest) -> None:
    reader = Reader(manifest)
    concept_of = {
        int(manifest.sample_ids[row]): reader.read(row).metadata["concept"] for row in range(31)
    }
    (batch,) = stream(manifest).batches(0, 1)
    concepts = [concept_of[i] for i in batch.sample_ids.tolist()]
    expected = [[a == b for a in concepts] for b in concepts]
    found = batch.group_ids[:, None] == batch.group_ids[None]
    assert found.tolist() == expected
    assert sum(map(sum, expected)) > 12


def test_without_a_group_field_every_sample_is_alone(manifest: Manifest) -> None:
    (batch,) = stream(manifest, group_field=None).batches(0, 1)
    assert torch.equal(batch.group_ids, batch.sample_ids)


def test_a_missing_group_field_names_those_there_are(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="'colour' is not in its .json, which has concept, style"):
        list(stream(manifest, group_field="colour").batches(0, 1))


def test_labels_are_ids_that_are_alike_wherever_the_labels_are(manifest: Manifest) -> None:
    (batch,) = stream(manifest, label_field="concept", max_labels=2).batches(0, 1)
    assert batch.label_ids is not None
    assert batch.label_ids[:, 1].tolist() == [-1] * len(batch.images)  # a drawing has one concept
    assert torch.equal(batch.label_ids[:, 0], batch.group_ids)
    sample = Sample(key="k", image=b"", text="", metadata={"tags": ["a", "b", "a", "c"]})
    found = label_ids(sample, "tags", most=4)
    assert len(set(found)) == 4
    assert (min(found[:3]) > 0, found[3]) == (True, -1)
    assert label_ids(sample, "tags", most=2) == found[:2]
    with pytest.raises(DataError, match="'k': data.stream.label_field='hue' is to be a label or a"):
        label_ids(sample, "hue", most=2)


def test_an_undecodable_image_names_shard_and_key(tmp_path: Path) -> None:
    bad = Sample(key="bad", image=b"\xff\xd8\xff broken", text="x", metadata={"concept": "x"})
    write_shards([*drawn_samples(3), bad], tmp_path, prefix="p")
    with pytest.raises(DataError, match=r"p-000000\.tar: sample 'bad': not a readable image"):
        list(stream(build_manifest(tmp_path)).batches(0, 1))


def with_bad_samples(folder: Path, *, good: int, bad: int) -> Manifest:
    """Bad images lie between the good ones."""
    samples = drawn_samples(good)
    for number in range(bad):
        broken = Sample(
            key=f"bad{number}", image=b"\xff\xd8\xff broken", text="x", metadata={"concept": "x"}
        )
        samples.insert(5 * number, broken)
    write_shards(samples, folder, prefix="p", samples_per_shard=10)
    return build_manifest(folder)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bad_samples_are_replaced_alike_at_any_world_size(tmp_path: Path, size: int) -> None:
    manifest = with_bad_samples(tmp_path, good=37, bad=4)
    reader = Reader(manifest)
    keys = {int(manifest.sample_ids[row]): reader.read(row).key for row in range(41)}
    whole = list(stream(manifest, max_bad_fraction=0.5).batches(0, 8))
    assert not any(keys[i].startswith("bad") for b in whole for i in b.sample_ids.tolist())
    parts = [
        list(stream(manifest, rank=r, size=size, max_bad_fraction=0.9, threads=r + 1).batches(0, 8))
        for r in range(size)
    ]
    for step, batch in enumerate(whole):
        for name in ("images", "token_ids", "sample_ids", "group_ids"):
            joined = torch.cat([getattr(part[step], name) for part in parts])
            assert torch.equal(joined, getattr(batch, name))


def test_bad_samples_are_written_down_once_with_shard_key_and_reason(tmp_path: Path) -> None:
    manifest = with_bad_samples(tmp_path / "data", good=37, bad=4)
    ledger = tmp_path / "run" / "quarantine.jsonl"
    for _ in range(2):  # the second run finds the ledger of the first
        training = stream(manifest, max_bad_fraction=0.5, ledger=ledger)
        list(training.batches(0, 8))
        assert len(training.quarantine) == 4
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert {entry["key"] for entry in entries} == {"bad0", "bad1", "bad2", "bad3"}
    assert len(entries) == 4
    assert all(entry["shard"].startswith("p-00000") for entry in entries)
    assert all("not a readable image" in entry["reason"] for entry in entries)
    assert all(entry["first_seen"].startswith("20") for entry in entries)


def test_more_bad_samples_than_allowed_stop_the_run(tmp_path: Path) -> None:
    manifest = with_bad_samples(tmp_path, good=36, bad=4)
    with pytest.raises(DataError, match=r"bad sample number 3, over data.stream.max_bad_fraction"):
        list(stream(manifest, max_bad_fraction=0.05).batches(0, 8))


def test_a_shard_that_vanishes_in_training_stops_it_with_its_name(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, 31)
    training = stream(manifest)
    (tmp_path / "drawn-000001.tar").unlink()
    with pytest.raises(DataError, match=r"drawn-000001\.tar: cannot be read"):
        list(training.batches(0, 8))


def test_bytes_damaged_after_indexing_are_one_bad_sample(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, 40)
    path = tmp_path / "drawn-000002.tar"
    data = bytearray(path.read_bytes())
    entry = manifest.index[25]
    start = int(entry["offset"] + entry["image_start"])
    data[start : start + int(entry["image_size"])] = b"?" * int(entry["image_size"])
    path.write_bytes(data)
    training = stream(manifest, max_bad_fraction=0.05)
    batches = list(training.batches(0, 10))
    assert len(training.quarantine) == 1
    assert int(manifest.sample_ids[25]) not in {i for b in batches for i in b.sample_ids.tolist()}


def test_captions_follow_their_frequencies_and_keep_the_words() -> None:
    sample = Sample(key="k", image=b"", text="red car", metadata={"tags": ["auto", "fast", "toy"]})
    config = CaptionConfig(text=0.5, text_and_tags=0.3, tags=0.2, max_tags=2)
    generator = np.random.default_rng(0)
    drawn = [choose_caption(sample, config, generator) for _ in range(3000)]
    plain = sum(c == "red car" for c in drawn) / 3000
    both = sum(c.startswith("red car, ") for c in drawn) / 3000
    assert plain == pytest.approx(0.5, abs=0.04)
    assert both == pytest.approx(0.3, abs=0.04)
    words = {word for c in drawn for word in c.removeprefix("red car").strip(", ").split(", ")}
    assert words == {"", "auto", "fast", "toy"}
    assert max(len(c.split(", ")) for c in drawn if not c.startswith("red car")) == 2


def test_a_sample_without_tags_uses_its_text() -> None:
    sample = Sample(key="k", image=b"", text="red car")
    config = CaptionConfig(text=0, tags=1)
    assert choose_caption(sample, config, np.random.default_rng(0)) == "red car"


def test_a_caption_policy_without_any_form_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one of text"):
        CaptionConfig(text=0)


def test_a_filter_decides_what_a_reader_opens(tmp_path: Path) -> None:
    from vlm.data.dataset import open_reader
    from vlm.data.filter import FilterConfig, build_filter
    from vlm.data.remote import RemoteConfig
    from vlm.preprocess import decode_picture

    write_dataset(tmp_path, 40)
    config = FilterConfig.model_validate({"name": "unique", "exact_duplicates": "image"})
    report = build_filter(tmp_path, config, decode=decode_picture, workers=1)
    reader, _ = open_reader(str(tmp_path), remote=RemoteConfig(), filter_name="unique")
    with reader:
        images = [reader.read(row).image for row in range(reader.num_samples)]
    assert len(images) == len(set(images)) == report.num_kept < 40
