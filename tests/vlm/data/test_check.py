"""Every kind of damage is found, and mending keeps every good sample byte for byte."""

import gzip
import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support import drawn_samples, write_dataset
from vlm.cli.main import app
from vlm.data.check import ShardReport, check_shards
from vlm.data.manifest import build_manifest, open_manifest
from vlm.data.sequential import iterate_samples
from vlm.errors import DataError
from vlm.preprocess import decode_image

SHARD = "drawn-000001.tar"  # the middle one of three, 10 samples each


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path, 30)
    return tmp_path


def checked(folder: Path, *, repair: bool = False, workers: int = 1) -> list[ShardReport]:
    return check_shards(folder, decode=decode_image, repair=repair, workers=workers)


def reasons(reports: list[ShardReport]) -> list[tuple[str | None, str]]:
    return [(damage.key, damage.reason) for report in reports for damage in report.damages]


def rewritten(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> None:
    """The shard with other members, as a careless tool would write it."""
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]  # all are files
    with tarfile.open(path, "w") as tar:
        for name, data in change(members).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def test_whole_shards_have_no_damage(folder: Path) -> None:
    assert [(r.num_good, r.damages) for r in checked(folder)] == [(10, ())] * 3


def test_samples_behind_a_bad_header_are_kept(folder: Path) -> None:
    manifest = open_manifest(folder)
    path = folder / SHARD
    data = bytearray(path.read_bytes())
    offset = int(manifest.index[14]["offset"])  # the fifth sample of this shard
    data[offset : offset + 512] = b"\xaa" * 512
    path.write_bytes(data)
    without_manifest(folder)
    found = reasons(checked(folder))
    assert (None, "not a tar header, or its checksum is wrong") in found
    # Its .json is lost: it would be a sample without metadata.
    assert [key for key, _ in found if key is not None] == ["s00014"]
    reports = checked(folder, repair=True)
    assert [report.num_good for report in reports] == [10, 9, 10]
    build_manifest(folder)
    expected = [s for number, s in enumerate(drawn_samples(30)) if number != 14]
    assert list(iterate_samples(folder)) == expected


@pytest.mark.parametrize("inside", [True, False])
def test_a_truncated_shard_keeps_what_is_before(folder: Path, inside: bool) -> None:
    entry = open_manifest(folder).index[15]
    path = folder / SHARD
    cut = int(entry["offset"]) + (int(entry["image_start"]) + 20 if inside else 0)
    path.write_bytes(path.read_bytes()[:cut])
    without_manifest(folder)
    (_, reason), *samples = reasons(checked(folder))
    assert reason.startswith("truncated inside" if inside else "truncated: the closing")
    assert [key for key, _ in samples] == (["s00015"] if inside else [])
    assert checked(folder, repair=True)[1].num_good == 5
    build_manifest(folder)
    expected = [s for number, s in enumerate(drawn_samples(30)) if not 15 <= number < 20]
    assert list(iterate_samples(folder)) == expected


def bomb() -> bytes:
    """A valid PNG of 40,000 x 40,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    image = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + image + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("suffix", "data", "reason"),
    [
        ("png", b"\x89PNG\r\n\x1a\n", "not a readable image"),
        ("png", bomb(), "over the limit of 50000000"),
        ("txt", b"\xff\xfe", "its text is not UTF-8"),
        ("txt", b" \n", "its text is empty"),
        ("json", b"[]", "its .json is not an object"),
        ("json", b"{", "Expecting property name"),
        ("txt", None, "no text"),
        ("png", None, "no image"),
    ],
)
def test_a_bad_sample_is_named_and_left_out(
    folder: Path, suffix: str, data: bytes | None, reason: str
) -> None:
    name = f"s00013.{suffix}"

    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        if data is None:
            return {key: value for key, value in members.items() if key != name}
        return {**members, name: data}

    rewritten(folder / SHARD, change)
    without_manifest(folder)
    ((key, found),) = reasons(checked(folder))
    assert key == "s00013"
    assert reason in found
    checked(folder, repair=True)
    assert build_manifest(folder).num_samples == 29
    assert reasons(checked(folder)) == []


def test_a_key_that_comes_again_keeps_its_first_sample(folder: Path) -> None:
    rewritten(folder / SHARD, lambda members: members)
    with tarfile.open(folder / SHARD, "a") as tar:
        for suffix, data in (("png", drawn_samples(1)[0].image), ("txt", b"again")):
            info = tarfile.TarInfo(f"s00010.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    without_manifest(folder)
    assert reasons(checked(folder, repair=True)) == [("s00010", "its key comes again")]
    build_manifest(folder)
    assert list(iterate_samples(folder)) == drawn_samples(30)


def test_an_empty_a_vanished_and_a_changed_shard_are_named(folder: Path) -> None:
    (folder / "drawn-000000.tar").write_bytes(b"")
    (folder / SHARD).unlink()
    rewritten(folder / "drawn-000002.tar", lambda members: members)
    found = {report.shard: [d.reason for d in report.damages] for report in checked(folder)}
    assert found["drawn-000000.tar"][0] == "empty file"
    assert found[SHARD] == ["the shard is gone"]
    assert found["drawn-000002.tar"][0].startswith("changed since indexing")


def test_processes_find_what_one_finds_and_the_damaged_shard_is_kept_aside(folder: Path) -> None:
    path = folder / SHARD
    whole = path.read_bytes()
    path.write_bytes(whole[:4096])
    assert checked(folder, workers=2) == checked(folder)
    checked(folder, repair=True, workers=2)
    assert (folder / "damaged" / SHARD).read_bytes() == whole[:4096]
    assert not list(folder.glob(".*draft*"))


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no .tar shards here"):
        checked(tmp_path)


def test_the_verb_refuses_damage_and_repairs_it_when_asked(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:4096])
    verb = ["data", "check", str(folder), "--workers", "1"]
    refused = CliRunner().invoke(app, verb)
    assert isinstance(refused.exception, DataError)
    assert "--repair` keeps the good samples" in str(refused.exception)
    assert f"{SHARD}: at byte" in refused.output
    mended = CliRunner().invoke(app, [*verb, "--repair"])
    assert mended.exit_code == 0
    assert "samples indexed; of 1 shard the damaged one is in" in mended.output
    assert CliRunner().invoke(app, verb).exit_code == 0


def test_all_damages_go_to_a_report_however_many_there_are(folder: Path, tmp_path: Path) -> None:
    def cut(members: dict[str, bytes]) -> dict[str, bytes]:
        return {name: data[:40] if name.endswith("png") else data for name, data in members.items()}

    for path in folder.glob("*.tar"):
        rewritten(path, cut)
    without_manifest(folder)
    report = tmp_path / "report.jsonl"
    verb = ["data", "check", str(folder), "--workers", "1", "--report", str(report)]
    said = CliRunner().invoke(app, verb).output
    assert "and 13 more; --report FILE lists all" in said
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert len(lines) == 33  # each sample, and each shard for having none
    # The reason of one damage is the same in every run: no address of an object is in it.
    assert not any("0x" in line["reason"] for line in lines)


def test_a_shard_that_was_added_after_indexing_is_told(folder: Path) -> None:
    (folder / "sub").mkdir()
    shutil.copy(folder / SHARD, folder / "sub/Late.TAR")
    (report,) = [report for report in checked(folder) if report.damages]
    assert report.shard == "sub/Late.TAR"
    assert report.damages[0].reason == "not in the manifest, so training does not see it"
    assert not checked(folder, repair=True)[-1].mended  # indexing anew is all it needs


def test_a_shard_in_a_sub_folder_is_mended_there_and_what_is_aside_is_not_indexed(
    folder: Path,
) -> None:
    (folder / "sub").mkdir()
    (folder / SHARD).rename(folder / "sub" / SHARD)
    build_manifest(folder)
    path = folder / "sub" / SHARD
    path.write_bytes(path.read_bytes()[:4096])
    reports = checked(folder, repair=True)
    assert [report.shard for report in reports if report.mended] == [f"sub/{SHARD}"]
    assert (folder / "damaged/sub" / SHARD).is_file()
    assert [shard.name for shard in build_manifest(folder).shards] == [
        "drawn-000000.tar",
        "drawn-000002.tar",
        f"sub/{SHARD}",
    ]


def test_a_compressed_tar_is_told_from_a_damaged_one(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(gzip.compress(path.read_bytes()))
    without_manifest(folder)
    assert (None, "not a tar header, compressed by gzip; unpack it") in reasons(checked(folder))


def test_the_next_header_is_found_behind_long_damage(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    # Longer than what is read at a time, and with the start of a header that is none.
    lost = b"\xaa" * 257 + b"ustar" + b"\xaa" * (3 * 2**20 - 262)
    (folder / SHARD).write_bytes(lost + data)
    without_manifest(folder)
    assert reasons(checked(folder)) == [(None, "not a tar header, or its checksum is wrong")]
    assert checked(folder)[1].num_good == 10
