"""Shards as a source: ours, and those of img2dataset."""

import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import drawing, drawn_samples, encoded
from vlm.data.manifest import build_manifest, holds_shards
from vlm.data.samples import Sample
from vlm.data.sequential import iterate_samples
from vlm.data.sources.protocol import BadSample
from vlm.data.sources.shards import ShardsSource
from vlm.data.write import write_shards
from vlm.data.write_parallel import WriteOptions, write_dataset
from vlm.errors import DataError


def resharded(source: Path, target: Path, samples_per_shard: int, *, workers: int = 1) -> None:
    write_dataset(
        lambda scratch: ShardsSource(source),
        target,
        options=WriteOptions(samples_per_shard=samples_per_shard),
        workers=workers,
    )


def test_a_set_sharded_anew_and_back_has_the_bytes_it_had(tmp_path: Path) -> None:
    first = tmp_path / "a"
    write_shards(drawn_samples(25), first, prefix="shard", samples_per_shard=10)
    build_manifest(first)
    resharded(first, tmp_path / "b", 4, workers=2)
    assert list(iterate_samples(tmp_path / "b")) == drawn_samples(25)
    resharded(tmp_path / "b", tmp_path / "c", 10)
    files = [sorted((path.name, path.read_bytes()) for path in folder.iterdir())
             for folder in (first, tmp_path / "c")]  # fmt: skip
    assert files[0] == files[1]


def test_a_key_that_comes_again_in_one_new_shard_gets_its_source_shard_in_front(
    tmp_path: Path,
) -> None:
    source = tmp_path / "a"
    for prefix in ("p", "q.v1"):
        write_shards(drawn_samples(3), source, prefix=prefix)
    build_manifest(source)
    resharded(source, tmp_path / "b", 4)
    keys = [sample.key for sample in iterate_samples(tmp_path / "b")]
    # The second new shard begins after its first key, so the others are new to it.
    assert keys == ["s00000", "s00001", "s00002", "q_v1-000000_s00000", "s00001", "s00002"]
    whole = [sample.key for sample in ShardsSource(source).read(0, 6)]
    assert len(set(whole)) == 6


@pytest.mark.parametrize("key", ["k" * 150, "größe", "sub.d/a"])
def test_keys_that_need_more_than_one_header_stay(tmp_path: Path, key: str) -> None:
    samples = [replace(drawn_samples(1)[0], key=key), drawn_samples(2)[1]]
    write_shards(samples, tmp_path / "a", prefix="x")
    build_manifest(tmp_path / "a")
    resharded(tmp_path / "a", tmp_path / "b", 2)
    assert [sample.key for sample in iterate_samples(tmp_path / "b")] == [key, "s00001"]


def test_shards_that_are_not_indexed_are_told_from_images_and_how_to_index(tmp_path: Path) -> None:
    write_shards(drawn_samples(3), tmp_path, prefix="x")
    assert holds_shards(tmp_path)
    with pytest.raises(DataError, match=r"manifest\.json is missing; run `vlm data index"):
        ShardsSource(tmp_path)


def test_a_source_sent_to_a_worker_does_not_carry_its_index(tmp_path: Path) -> None:
    write_dataset_of_images(tmp_path, 48)
    source = ShardsSource(tmp_path)
    data = pickle.dumps(source)
    assert len(data) < 500
    assert pickle.loads(data).facts() == source.facts()


def write_dataset_of_images(folder: Path, count: int) -> None:
    write_shards(drawn_samples(count), folder, prefix="drawn", samples_per_shard=10)
    build_manifest(folder)


def test_a_sample_whose_metadata_is_torn_is_bad_and_those_behind_it_are_not(
    tmp_path: Path,
) -> None:
    write_dataset_of_images(tmp_path, 3)
    path = tmp_path / "drawn-000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"green-circle"', b'"green-circle]'))
    bad, good = list(ShardsSource(tmp_path).read(1, 3))
    assert isinstance(bad, BadSample)
    assert isinstance(good, Sample)
    assert (bad.key, good.key) == ("s00001", "s00002")


def img2dataset_folder(folder: Path) -> list[dict[str, Any]]:
    """Two shards as img2dataset's webdataset writer leaves them; returns the rows of all."""
    folder.mkdir()
    rows = []
    for shard in range(2):
        own = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(3):
                key = f"{shard:05d}{number:04d}"
                image = encoded(drawing("red", "circle", seed=number), "JPEG")
                row = {
                    "url": f"http://example.org/{key}.jpg",
                    "caption": f"größe {key}",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": 32,
                    "height": 32,
                    "exif": "{}",
                }
                own.append(row)
                members = {"jpg": image, "txt": f"größe {key}".encode()}
                members["json"] = json.dumps(row, indent=4).encode()
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size, info.mtime = len(data), 1_700_000_000
                    tar.addfile(info, io.BytesIO(data))
        failed = {**own[0], "key": f"{shard:05d}0003", "status": "failed_to_download"}
        pq.write_table(pa.Table.from_pylist([*own, failed]), folder / f"{shard:05d}.parquet")
        stats = {"count": 4, "successes": 3, "failed_to_download": 1}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
        rows += own
    return rows


def test_what_img2dataset_leaves_is_indexed_and_sharded_anew(tmp_path: Path) -> None:
    rows = img2dataset_folder(tmp_path / "a")
    assert build_manifest(tmp_path / "a").num_samples == 6
    resharded(tmp_path / "a", tmp_path / "b", 4)
    found = list(iterate_samples(tmp_path / "b"))
    assert [(s.key, s.text, s.metadata) for s in found] == [
        (row["key"], row["caption"], row) for row in rows
    ]
    assert sorted(path.name for path in (tmp_path / "b").glob("*.tar")) == [
        "shard-000000.tar",
        "shard-000001.tar",
    ]


def test_captions_that_lie_in_the_metadata_or_in_class_labels_are_sharded_anew(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").mkdir()
    image = drawn_samples(1)[0].image
    members = {"a.png": image, "a.json": b'{"caption": "a cat"}', "b.png": image, "b.cls": b"3"}
    with tarfile.open(tmp_path / "a/x.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    build_manifest(tmp_path / "a")
    resharded(tmp_path / "a", tmp_path / "b", 2)
    found = list(ShardsSource(tmp_path / "b").read(0, 2))
    assert [sample.metadata for sample in found if isinstance(sample, Sample)] == [
        {"caption": "a cat"},
        {"cls": 3},
    ]
    with pytest.raises(DataError, match=r"sample 'a' has no \.txt"):
        list(iterate_samples(tmp_path / "b"))
