"""Writing, indexing and reading shards, and every way in which one can be damaged."""

import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from tests.support import drawn_samples, write_dataset
from vlm.data.captions import CaptionConfig, caption_texts
from vlm.data.manifest import build_manifest, open_manifest
from vlm.data.reader import BadSampleError, Reader
from vlm.data.samples import Sample, decode_text_and_metadata
from vlm.data.scan import INDEX_DTYPE
from vlm.data.sequential import iterate_samples
from vlm.data.write import write_shards
from vlm.errors import DataError


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, 23)
    assert [shard.num_samples for shard in manifest.shards] == [10, 10, 3]
    with Reader(manifest) as reader:
        assert [reader.read(row) for row in range(23)] == drawn_samples(23)


def test_streaming_equals_random_access(tmp_path: Path) -> None:
    with Reader(write_dataset(tmp_path, 23)) as reader:
        assert list(iterate_samples(tmp_path)) == [reader.read(row) for row in range(23)]


def test_plain_webdataset_reads_our_shards(tmp_path: Path) -> None:
    write_dataset(tmp_path, 5)
    path = str(tmp_path / "drawn-000000.tar")
    with Path(path).open("rb") as file:
        members = webdataset.tariterators.tar_file_expander([{"url": path, "stream": file}])
        found = list(webdataset.tariterators.group_by_keys(members))
    decoded = [webdataset.autodecode.Decoder([webdataset.imagehandler("pil")])(s) for s in found]
    assert [s["txt"] for s in decoded] == [s.text for s in drawn_samples(5)]
    assert decoded[0]["png"].size == (32, 32)
    assert decoded[0]["json"] == drawn_samples(1)[0].metadata


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "a", 12)
    time.sleep(1.1)  # tar times have whole seconds
    second = write_dataset(tmp_path / "b", 12)
    assert first.fingerprint == second.fingerprint


def test_the_index_takes_40_bytes_a_sample_and_stays_on_disk(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, 12)
    assert INDEX_DTYPE.itemsize == 40
    assert isinstance(manifest.index, np.memmap)


def test_sample_ids_are_distinct_stable_and_not_negative(tmp_path: Path) -> None:
    ids = write_dataset(tmp_path, 40).sample_ids
    assert len(set(ids.tolist())) == 40
    assert (ids >= 0).all()
    assert ids[0] == 2224333033624458740


def test_rows_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="row 5 is out of range, there are 5"):
        Reader(write_dataset(tmp_path, 5)).read(5)


def test_many_shards_are_read_with_few_open_files(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, 70, samples_per_shard=1)
    with Reader(manifest) as reader:
        keys = [reader.read(row).key for row in [*range(70), *range(70)]]
    assert keys == [s.key for s in drawn_samples(70)] * 2


def test_an_interrupted_writer_leaves_no_shard_under_a_final_name(tmp_path: Path) -> None:
    def broken() -> Iterator[Sample]:
        yield from drawn_samples(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), tmp_path, prefix="x", samples_per_shard=2)
    assert [path.name for path in tmp_path.iterdir()] == ["x-000000.tar"]
    assert build_manifest(tmp_path).num_samples == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key": "a.b"}, "must not be empty, absolute, lead out, or contain a dot"),
        ({"image": b"GIF89a"}, "sample 's00000': not a JPEG, PNG or WebP file"),
    ],
)
def test_a_sample_that_cannot_be_stored_is_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        write_shards([replace(drawn_samples(1)[0], **change)], tmp_path, prefix="x")
    assert list(tmp_path.iterdir()) == []


def tar_with(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


PNG = drawn_samples(1)[0].image


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.png", PNG)], "sample 'a' at byte 0 has no json or label or text"),
        ([("a.txt", b"x")], "sample 'a' at byte 0 has no image"),
        ([("a.png", PNG), ("a.txt", b"x"), ("a.jpg", PNG)], "key 'a' comes again"),
        (
            [("a.png", PNG), ("a.txt", b"x"), ("b.png", PNG), ("b.txt", b"x"), ("a.txt", b"x")],
            "key 'a' comes again at byte",
        ),
        ([("readme.md", b"hello")], "no samples"),
    ],
)
def test_shards_without_whole_pairs_are_named(
    tmp_path: Path, members: list[tuple[str, bytes]], said: str
) -> None:
    tar_with(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=said) as caught:
        build_manifest(tmp_path)
    assert "x.tar" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 300, 700, 1024, 2000])
def test_a_shard_cut_anywhere_is_found(tmp_path: Path, keep: int) -> None:
    write_shards(drawn_samples(3), tmp_path, prefix="x")
    path = tmp_path / "x-000000.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x-000000\.tar"):
        build_manifest(tmp_path)


def test_a_shard_cut_between_members_is_found(tmp_path: Path) -> None:
    write_shards(drawn_samples(3), tmp_path, prefix="x")
    path = tmp_path / "x-000000.tar"
    with tarfile.open(path) as tar:
        second = next(m for m in tar.getmembers() if m.name.startswith("s00001")).offset
    path.write_bytes(path.read_bytes()[:second])
    with pytest.raises(DataError, match="closing blocks of a tar are missing"):
        build_manifest(tmp_path)


def test_a_shard_that_changed_after_indexing_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, 12)
    with (tmp_path / "drawn-000001.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(
        DataError, match=r"drawn-000001\.tar: changed since indexing.*vlm data index"
    ):
        open_manifest(tmp_path)


def test_a_shard_that_vanished_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, 12)
    (tmp_path / "drawn-000000.tar").unlink()
    with pytest.raises(DataError, match=r"drawn-000000\.tar: the shard is gone"):
        open_manifest(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "shards.npy", "index.npy"])
def test_a_damaged_or_missing_index_says_how_to_make_it_anew(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path, 12)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(DataError, match="damaged.*vlm data index"):
        open_manifest(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing; run `vlm data index"):
        open_manifest(tmp_path)


def test_an_index_of_other_shards_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", 12)
    write_dataset(tmp_path / "b", 13)
    (tmp_path / "a/index.npy").write_bytes((tmp_path / "b/index.npy").read_bytes())
    with pytest.raises(DataError, match="does not belong to"):
        open_manifest(tmp_path / "a")


def test_an_empty_folder_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no .tar shards here; write some with"):
        build_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"\xff\xfe", "invalid start byte"),
        ("a.json", b"{", "Expecting property name"),
        ("a.json", b"[1]", "not an object"),
    ],
)
def test_text_that_cannot_be_decoded_is_named_by_the_reader(
    tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    members = {"a.png": PNG, "a.txt": b"x", "a.json": b"{}"} | {name: data}
    tar_with(tmp_path / "x.tar", list(members.items()))
    with pytest.raises(DataError, match=said) as caught, Reader(build_manifest(tmp_path)) as reader:
        reader.read(0)
    assert "'a' at byte 0" in str(caught.value)


def test_a_shard_cut_while_it_is_read_is_told(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, 5)
    path = tmp_path / "drawn-000000.tar"
    path.write_bytes(path.read_bytes()[:4000])
    with Reader(manifest) as reader, pytest.raises(DataError, match="ends at byte 4000, inside"):
        reader.read(4)


def test_a_sample_of_others_without_metadata_is_read(tmp_path: Path) -> None:
    tar_with(tmp_path / "x.tar", [("sub/a.jpg", PNG), ("sub/a.txt", b" hi \n")])
    with Reader(build_manifest(tmp_path)) as reader:
        assert reader.read(0) == Sample(key="sub/a", image=PNG, text="hi")


def test_a_killed_writer_leaves_no_partial_shard(tmp_path: Path) -> None:
    code = (
        "import sys, itertools\n"
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from tests.support import drawn_samples\n"
        "from vlm.data.write import write_shards\n"
        "base = drawn_samples(1)[0]\n"
        "endless = (replace(base, key=f'k{i}') for i in itertools.count())\n"
        "print('go', flush=True)\n"
        f"write_shards(endless, Path({str(tmp_path)!r}), prefix='x', samples_per_shard=50)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("x-*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    process.stdout.close()
    shards = len(list(tmp_path.glob("x-*.tar")))
    assert shards >= 3
    assert build_manifest(tmp_path).num_samples == 50 * shards
    assert json.loads((tmp_path / "manifest.json").read_text())["version"] == 2


def test_shards_at_any_depth_and_in_any_case_are_indexed_and_drafts_are_not(tmp_path: Path) -> None:
    for name in ("a.TAR", "deep/er/b.tar", ".draft/c.tar", "damaged/d.tar", ".e.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        stem = Path(name).stem
        tar_with(tmp_path / name, [(f"x/{stem}.PNG", PNG), (f"x/{stem}.TXT", b"upper case")])
    manifest = build_manifest(tmp_path)
    assert [shard.name for shard in manifest.shards] == ["a.TAR", "deep/er/b.tar"]
    found = list(iterate_samples(tmp_path))
    assert [(sample.key, sample.text) for sample in found] == [
        ("x/a", "upper case"),
        ("x/b", "upper case"),
    ]


def test_class_labels_become_captions_by_their_names(tmp_path: Path) -> None:
    tar_with(
        tmp_path / "x.tar", [("a.png", PNG), ("a.cls", b"1\n"), ("b.png", PNG), ("b.cls", b"0")]
    )
    with Reader(build_manifest(tmp_path)) as reader:
        samples = [reader.read(row) for row in range(2)]
    assert [sample.metadata for sample in samples] == [{"cls": 1}, {"cls": 0}]
    config = CaptionConfig(fields=("cls",), label_names=("cat", "dog"))
    assert [caption_texts(sample, config) for sample in samples] == [["dog"], ["cat"]]
    # Without that setting a label is no caption, rather than the caption "1".
    with pytest.raises(DataError, match=r"its \.json has cls"):
        caption_texts(samples[0], CaptionConfig())


def test_a_label_that_is_no_number_is_named(tmp_path: Path) -> None:
    tar_with(tmp_path / "x.tar", [("a.png", PNG), ("a.cls", b"[1]")])
    with (
        Reader(build_manifest(tmp_path)) as reader,
        pytest.raises(BadSampleError, match="sample 'a' at byte 0: its .json is not an object"),
    ):
        reader.read(0)


def test_the_mark_of_windows_before_utf8_is_no_part_of_a_caption() -> None:
    assert decode_text_and_metadata(b"\xef\xbb\xbfa cat", b"{}") == ("a cat", {})


def test_json_too_deep_for_the_parser_is_the_fault_of_its_sample() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        decode_text_and_metadata(b"", b"[" * 100_000)
