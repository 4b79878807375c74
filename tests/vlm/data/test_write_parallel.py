"""Folders of shards that are the same whoever writes them, and however often that is stopped."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import drawn_samples
from vlm.data.manifest import open_manifest
from vlm.data.samples import Sample
from vlm.data.sequential import iterate_samples
from vlm.data.sources.folder import open_folder
from vlm.data.sources.protocol import BadSample, SampleSource
from vlm.data.sources.table import open_table
from vlm.data.target import SCRATCH, hold_target
from vlm.data.write_parallel import WriteOptions, WriteProgress, WriteResult, write_dataset
from vlm.errors import DataError


class Listed:
    """Samples out of a list; a reason stands for a bad one."""

    needs_text = True

    def __init__(self, rows: list[Sample | str], *, name: str = "list") -> None:
        self.rows = rows
        self.name = name
        self.reads: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def facts(self) -> dict[str, Any]:
        return {"kind": "list", "path": self.name, "samples": len(self)}

    def where(self, row: int) -> str:
        return f"{self.name}: row {row}"

    def read(self, start: int, stop: int) -> Iterator[Sample | BadSample]:
        self.reads.append((start, stop))
        for row in range(start, stop):
            found = self.rows[row]
            yield BadSample(key=str(row), reason=found) if isinstance(found, str) else found


def written(
    source: SampleSource,
    folder: Path,
    *,
    samples_per_shard: int = 4,
    skip_bad: bool = False,
    progress: Callable[[WriteProgress], None] | None = None,
    encode: Callable[[bytes], bytes] | None = None,
    workers: int = 1,
) -> WriteResult:
    return write_dataset(
        lambda scratch: source,
        folder,
        options=WriteOptions(samples_per_shard=samples_per_shard, skip_bad=skip_bad),
        encode=encode,
        workers=workers,
        progress=progress,
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for sample in drawn_samples(count):
        (folder / f"{sample.key}.png").write_bytes(sample.image)
        (folder / f"{sample.key}.txt").write_text(sample.text)
    return folder


def test_a_complete_folder_holds_the_samples_and_nothing_of_the_writing(tmp_path: Path) -> None:
    result = written(Listed([*drawn_samples(10)]), tmp_path / "out")
    assert result == WriteResult(num_samples=10, num_shards=3, num_skipped=0)
    assert list(iterate_samples(tmp_path / "out")) == drawn_samples(10)
    assert sorted(content(tmp_path / "out")) == [
        "index.npy",
        "manifest.json",
        *(f"shard-{number:06d}.tar" for number in range(3)),
        "shards.npy",
    ]


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    images = images_folder(tmp_path / "images", 21)
    table = images / "pairs.csv"
    table.write_text(
        "image,caption\n" + "".join(f"{s.key}.png,{s.text}\n" for s in drawn_samples(21))
    )

    def opened(scratch: Path) -> SampleSource:
        return open_folder(images) if kind == "folder" else open_table(table, scratch=scratch)

    options = WriteOptions(samples_per_shard=4)
    for workers in (1, 3):
        write_dataset(opened, tmp_path / str(workers), options=options, workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "3")
    assert open_manifest(tmp_path / "3").num_samples == 21


class StopHere(BaseException):
    """In place of a signal."""


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_however_often_it_is_stopped_the_bytes_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows: list[Sample | str] = [*drawn_samples(14)]
    for row in data.draw(st.lists(st.integers(0, 12), unique=True), label="bad rows"):
        rows[row] = f"reason {row}"
    folder = tmp_path_factory.mktemp("out")
    written(Listed(rows), folder / "whole", skip_bad=True)
    for images_until_stop in data.draw(st.lists(st.integers(0, 14), max_size=4), label="stops"):
        counter = iter(range(images_until_stop))

        def encode(image: bytes, counter: Iterator[int] = counter) -> bytes:
            if next(counter, None) is None:
                raise StopHere
            return image

        try:
            written(Listed(rows), folder / "stopped", skip_bad=True, encode=encode)
        except StopHere:
            assert not list((folder / "stopped").glob(".*.draft"))
            continue
        break
    else:
        written(Listed(rows), folder / "stopped", skip_bad=True)
    assert content(folder / "stopped") == content(folder / "whole")


def stopped(source: Listed, folder: Path, *, shards: int, skip_bad: bool = False) -> None:
    """Write until so many shards are there."""

    def stop(now: WriteProgress) -> None:
        if now.shards == shards:
            raise StopHere

    with pytest.raises(StopHere):
        written(source, folder, progress=stop, skip_bad=skip_bad)


def test_a_second_call_writes_only_what_is_missing(tmp_path: Path) -> None:
    source = Listed([*drawn_samples(10)])
    stopped(source, tmp_path, shards=1)
    assert source.reads == [(0, 4)]
    seen: list[WriteProgress] = []
    written(source, tmp_path, progress=seen.append)
    assert source.reads == [(0, 4), (4, 8), (8, 10)]
    assert [(now.shards, now.rows, now.remaining_rows) for now in seen] == [
        (1, 0, 6),
        (2, 4, 2),
        (3, 6, 0),
    ]
    assert {now.total_shards for now in seen} == {3}


def test_other_sources_and_other_options_are_refused_and_named(tmp_path: Path) -> None:
    stopped(Listed([*drawn_samples(10)]), tmp_path, shards=1)
    before = content_of_files(tmp_path)
    with pytest.raises(DataError, match=r"source\.samples was 10 and is 9.*remove .* start anew"):
        written(Listed([*drawn_samples(9)]), tmp_path)
    with pytest.raises(DataError, match=r"options\.samples_per_shard was 4 and is 5"):
        written(Listed([*drawn_samples(10)]), tmp_path, samples_per_shard=5)
    assert content_of_files(tmp_path) == before


def content_of_files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_that_were_there_before_are_refused_and_untouched(tmp_path: Path) -> None:
    written(Listed([*drawn_samples(4)]), tmp_path)
    before = content(tmp_path)
    with pytest.raises(DataError, match="already holds shards; choose an empty folder"):
        written(Listed([*drawn_samples(4)]), tmp_path)
    assert content(tmp_path) == before


def test_a_shard_from_elsewhere_is_not_taken_in(tmp_path: Path) -> None:
    source = Listed([*drawn_samples(10)])
    stopped(source, tmp_path, shards=1)
    (tmp_path / "other.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"other\.tar: is not of this set of shards; move it"):
        written(source, tmp_path)


def test_a_torn_description_says_how_to_start_anew(tmp_path: Path) -> None:
    source = Listed([*drawn_samples(10)])
    stopped(source, tmp_path, shards=1)
    (tmp_path / "writing.json").write_bytes(b"{")
    with pytest.raises(DataError, match=r"writing\.json: cannot be read .* to start anew"):
        written(source, tmp_path)


def test_a_bad_sample_stops_it_and_is_named_and_mended_it_goes_on(tmp_path: Path) -> None:
    rows: list[Sample | str] = [*drawn_samples(9)]
    good, rows[5] = rows[5], "no image"
    with pytest.raises(DataError, match=r"list: row 5: sample '5': no image\. .*--skip-bad"):
        written(Listed(rows), tmp_path)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["shard-000000.tar"]
    rows[5] = good
    assert written(Listed(rows), tmp_path).num_samples == 9


def test_where_nothing_was_written_yet_other_options_may_be_given(tmp_path: Path) -> None:
    # After a bad first row the advice is --skip-bad, and it was refused as other options.
    rows: list[Sample | str] = ["no image", *drawn_samples(3)]
    with pytest.raises(DataError, match="--skip-bad"):
        written(Listed(rows), tmp_path)
    assert written(Listed(rows), tmp_path, skip_bad=True).num_samples == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": ""}, "its caption is empty"),
        ({"text": "\udc80"}, "surrogates not allowed"),
        ({"image": b"GIF89a"}, "not a JPEG, PNG or WebP file"),
        ({"key": "a.b"}, "must not be empty, absolute, lead out, or"),
        ({"key": "../../a"}, "must not be empty, absolute, lead out, or"),
    ],
)
def test_bad_samples_are_listed_and_the_others_stay_in_their_shards(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    rows: list[Sample | str] = [*drawn_samples(9)]
    rows[5] = Sample(**{**vars(drawn_samples(9)[5]), **change})
    result = written(Listed(rows), tmp_path, skip_bad=True)
    assert result == WriteResult(num_samples=8, num_shards=3, num_skipped=1)
    assert [shard.num_samples for shard in open_manifest(tmp_path).shards] == [4, 3, 1]
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["source"], found["key"]) == ("list: row 5", change.get("key", "s00005"))
    assert reason in found["reason"]


def test_an_image_that_cannot_be_encoded_is_a_bad_sample(tmp_path: Path) -> None:
    def refuse_one(image: bytes) -> bytes:
        if image == drawn_samples(2)[1].image:
            message = "torn"
            raise DataError(message)
        return image

    result = written(Listed([*drawn_samples(2)]), tmp_path, skip_bad=True, encode=refuse_one)
    assert (result.num_samples, result.num_skipped) == (1, 1)
    assert '"reason": "torn"' in (tmp_path / "skipped.jsonl").read_text()


def test_a_shard_whose_samples_are_all_bad_is_left_out_and_not_tried_again(tmp_path: Path) -> None:
    rows: list[Sample | str] = [*["bad"] * 4, *drawn_samples(6)]
    source = Listed(rows)
    stopped(source, tmp_path, shards=2, skip_bad=True)
    result = written(source, tmp_path, skip_bad=True)
    assert source.reads == [(0, 4), (4, 8), (8, 10)]
    assert result == WriteResult(num_samples=6, num_shards=2, num_skipped=4)
    assert [path.name for path in sorted(tmp_path.glob("*.tar"))] == [
        "shard-000001.tar",
        "shard-000002.tar",
    ]


def test_a_source_of_bad_samples_alone_is_told(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="every sample is bad, the first for this: no luck"):
            written(Listed(["no luck", "no luck"]), tmp_path, skip_bad=True)


def test_an_empty_source_is_told_and_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to write, the source has no samples"):
        written(Listed([]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_ends_early_is_a_defect(tmp_path: Path) -> None:
    class Short(Listed):
        def read(self, start: int, stop: int) -> Iterator[Sample | BadSample]:
            yield from super().read(start, stop - 1)

    with pytest.raises(ValueError, match="shorter"):
        written(Short([*drawn_samples(3)]), tmp_path)


def test_results_of_an_earlier_set_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "skipped.jsonl").write_text("{}\n")
    written(Listed([*drawn_samples(3)]), tmp_path)
    assert not (tmp_path / "skipped.jsonl").exists()


def test_two_writers_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.data.target._PATIENCE_SECONDS", 0.1)
    with hold_target(tmp_path), pytest.raises(DataError, match="another process writes into it"):
        written(Listed([*drawn_samples(3)]), tmp_path)
    assert written(Listed([*drawn_samples(3)]), tmp_path).num_samples == 3


def test_drafts_that_a_killed_writer_left_are_removed_and_other_files_not(tmp_path: Path) -> None:
    (tmp_path / ".shard-000007.tar.draft").write_bytes(b"half")
    (tmp_path / ".notes.draft").write_text("mine")
    written(Listed([*drawn_samples(3)]), tmp_path)
    assert [name for name in content(tmp_path) if name.startswith(".")] == [".notes.draft"]


@pytest.mark.parametrize(
    "step",
    [
        "vlm.data.write_parallel.build_manifest",
        "vlm.data.write_parallel.finish_writing",
        "vlm.data.target.shutil.rmtree",
    ],
)
def test_a_kill_after_the_last_shard_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    rows: list[Sample | str] = [*["bad"] * 4, *drawn_samples(6)]
    written(Listed(rows), tmp_path / "whole", skip_bad=True)
    with monkeypatch.context() as patched:
        patched.setattr(step, _stop)
        with pytest.raises(StopHere):
            written(Listed(rows), tmp_path / "out", skip_bad=True)
    source = Listed(rows)
    written(source, tmp_path / "out", skip_bad=True)
    assert source.reads == []
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def _stop(folder: Path, **_: object) -> None:
    if folder.name == SCRATCH:  # in the middle of its removal
        for path in folder.iterdir():
            path.unlink()
    raise StopHere


def test_the_scratch_folder_is_given_to_the_source_and_removed(tmp_path: Path) -> None:
    def opened(scratch: Path) -> SampleSource:
        assert scratch == tmp_path / SCRATCH
        scratch.mkdir()
        (scratch / "mine").touch()
        message = "no such source"
        raise DataError(message)

    with pytest.raises(DataError, match="no such source"):
        write_dataset(opened, tmp_path, options=WriteOptions())
    assert list(tmp_path.iterdir()) == []
