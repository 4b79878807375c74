"""Damage in shards: found in all of them at once, and mended without losing what is good.

Where a tar reader stops at the first bad header, this one goes on block by block to the next good
one, so that samples after the damage are found and kept.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, TypeVar

from vlm.data.location import open_location
from vlm.data.manifest import ShardInfo, indexed_shards
from vlm.data.parallel import run_jobs
from vlm.data.remote import RemoteConfig, fetch_shard
from vlm.data.samples import decode_text_and_metadata
from vlm.data.scan import DAMAGED_FOLDER, shard_paths, split_member_name
from vlm.errors import DataError
from vlm.files import open_whole

__all__ = ["Damage", "ShardReport", "check_remote_shards", "check_shards"]

_BLOCK: Final = 512
_TAR_MAGIC: Final = b"ustar"
_MAGIC_AT: Final = 257
_BLOCKS_AT_ONCE: Final = 2048
_PACKED: Final = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"PK", "zip"))

_NOT_LISTED: Final = ""
"""In the place of a checksum."""

Decode = Callable[[bytes], object]
Job = TypeVar("Job")


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong with a shard."""

    shard: str
    key: str | None
    """Of the sample, or none where the shard itself is meant."""
    offset: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What one shard holds."""

    shard: str
    num_good: int
    damages: tuple[Damage, ...]
    mended: bool = False


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A file of a tar that is wholly there."""

    name: str
    offset: int
    start: int
    size: int


def check_shards(
    folder: Path,
    *,
    decode: Decode,
    repair: bool,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[ShardReport]:
    """Read and decode everything in a folder of shards.

    Args:
        folder: Where the shards are, at any depth.
        decode: Raises `DataError` on a bad image; must be picklable if `workers` is above 1.
        repair: Replace each damaged shard by one with its good samples, byte for byte, in one
            rename; the damaged one is kept in `damaged/`. Build the manifest anew afterwards.
        workers: Processes.
        progress: Called with (shards done, shards in all).

    Returns:
        One report a shard, in order of names, those included that a manifest lists and that are
        gone.

    Raises:
        DataError: If there is no shard at all, or a repaired one cannot be written.
    """
    listed = {shard.name: shard.sha256 for shard in indexed_shards(folder)}
    paths = shard_paths(folder)
    if not paths and not listed:
        message = f"{folder}: no .tar shards here"
        raise DataError(message)
    reports = [_lost(name, "the shard is gone") for name in listed if name not in paths]
    # Without any manifest there is nothing that a shard could be missing from.
    expected = {name: listed.get(name, _NOT_LISTED if listed else None) for name in paths}
    check = functools.partial(_check_shard, folder, decode=decode, repair=repair)
    return _reports(check, list(expected.items()), workers, progress, reports)


def check_remote_shards(
    url: str,
    *,
    decode: Decode,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[ShardReport]:
    """As `check_shards`, of the shards that the manifest of a URL lists, fetched one by one.

    Raises:
        DataError: If there is no indexed dataset.
        StoreError: If the store does not answer.
    """
    manifest, shards = open_location(url, RemoteConfig())
    shards.close()
    check = functools.partial(_check_remote_shard, url, decode=decode)
    return _reports(check, manifest.shards, workers, progress, [])


def _reports(
    check: Callable[[Job], ShardReport],
    jobs: Sequence[Job],
    workers: int,
    progress: Callable[[int, int], None] | None,
    reports: list[ShardReport],
) -> list[ShardReport]:
    """With those of all jobs, in order of names."""
    with contextlib.closing(run_jobs(check, jobs, workers=workers)) as found:
        for done, report in enumerate(found, start=1):
            reports.append(report)
            if progress is not None:
                progress(done, len(jobs))
    return sorted(reports, key=lambda report: report.shard)


def _lost(shard: str, reason: str) -> ShardReport:
    damage = Damage(shard=shard, key=None, offset=0, reason=reason)
    return ShardReport(shard=shard, num_good=0, damages=(damage,))


def _check_remote_shard(url: str, info: ShardInfo, *, decode: Decode) -> ShardReport:
    with tempfile.TemporaryDirectory(prefix="vlm-check-") as scratch:
        path = Path(scratch) / info.name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch_shard(url, info, path, RemoteConfig())
        except DataError as error:
            return _lost(info.name, str(error))
        return _check_shard(Path(scratch), (info.name, info.sha256), decode=decode, repair=False)


def _check_shard(
    folder: Path, job: tuple[str, str | None], *, decode: Decode, repair: bool
) -> ShardReport:
    shard, sha256 = job
    with (folder / shard).open("rb") as file:
        damages: list[Damage] = []
        members = list(_members(file, shard, damages))
        good = list(_good_samples(file, shard, members, decode, damages))
        if not good:
            damages.append(Damage(shard=shard, key=None, offset=0, reason="no usable sample"))
        mended = repair and bool(damages)
        changed = _change(file, sha256)
        if mended:
            _mend(folder, shard, file, good)
    if changed is not None:
        damages.append(Damage(shard=shard, key=None, offset=0, reason=changed))
    return ShardReport(shard=shard, num_good=len(good), damages=tuple(damages), mended=mended)


def _change(file: io.BufferedReader, sha256: str | None) -> str | None:
    """How a shard differs from what the manifest says of it, if it does."""
    if sha256 is None:
        return None
    if sha256 == _NOT_LISTED:
        return "not in the manifest, so training does not see it"
    file.seek(0)
    if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
        return None
    return "changed since indexing: its SHA-256 is not that of the manifest"


def _members(file: BinaryIO, shard: str, damages: list[Damage]) -> Iterator[_Member]:
    """Every whole file member, also behind damage."""
    size = os.fstat(file.fileno()).st_size

    def damage(offset: int, reason: str) -> None:
        damages.append(Damage(shard=shard, key=None, offset=offset, reason=reason))

    if size == 0:
        damage(0, "empty file")
        return
    position: int | None = 0
    while position is not None and position < size:
        end = position
        for member in _readable_members(file, position):
            end = member.start + -(-member.size // _BLOCK) * _BLOCK
            if member.start + member.size > size:
                damage(member.offset, f"truncated inside {member.name!r}")
                return
            yield member
        position = _position_after(file, end, size, damage)


def _position_after(
    file: BinaryIO, end: int, size: int, damage: Callable[[int, str], None]
) -> int | None:
    """Where to read on behind the last readable member, or none at the end."""
    file.seek(end)
    block = file.read(2 * _BLOCK)
    if block.strip(b"\0"):
        packed = end == 0 and next((name for m, name in _PACKED if block.startswith(m)), None)
        hint = f"compressed by {packed}; unpack it" if packed else "or its checksum is wrong"
        damage(end, f"not a tar header, {hint}")
        return _next_header(file, end + _BLOCK, size)
    if len(block) < 2 * _BLOCK:
        damage(end, "truncated: the closing blocks are missing, so samples may be too")
        return None
    position = _next_header(file, end + 2 * _BLOCK, size)
    if position is not None:
        damage(position, "members after the end of the tar, which no reader sees")
    return position


def _readable_members(file: BinaryIO, position: int) -> Iterator[_Member]:
    """File members from a position on, until the tar ends or cannot be read."""
    file.seek(position)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield _Member(
                        name=member.name,
                        offset=member.offset,
                        start=member.offset_data,
                        size=member.size,
                    )
    except (tarfile.TarError, ValueError, OverflowError):
        return


def _next_header(file: BinaryIO, position: int, size: int) -> int | None:
    """Where the next block lies that is a header with a right checksum."""
    for start in range(position, size, _BLOCKS_AT_ONCE * _BLOCK):
        file.seek(start)
        chunk = file.read(_BLOCKS_AT_ONCE * _BLOCK)
        for offset in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
            # Of all formats in use; what it lets pass is judged by its checksum.
            if not chunk.startswith(_TAR_MAGIC, offset + _MAGIC_AT):
                continue
            try:
                tarfile.TarInfo.frombuf(chunk[offset : offset + _BLOCK], "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                continue
            return start + offset
    return None


def _good_samples(
    file: BinaryIO,
    shard: str,
    members: list[_Member],
    decode: Decode,
    damages: list[Damage],
) -> Iterator[list[_Member]]:
    """The members of each usable sample, in order; the rest go to `damages`."""
    groups = itertools.groupby(members, key=lambda member: split_member_name(member.name)[0])
    samples = [(key, list(group)) for key, group in groups]
    suffixes = Counter(_suffixes(sample) for _, sample in samples)
    usual = suffixes.most_common(1)[0][0] if suffixes else frozenset()
    # Behind a lost header a sample may look whole and lack, say, its metadata. Otherwise only
    # texts are missed: a whole shard may have its captions in the metadata, one sample may not.
    usual = usual if damages else usual & {"text", "label"}
    seen: set[str] = set()
    for key, sample in samples:
        missing = ", ".join(sorted(usual - _suffixes(sample)))
        if key in seen:
            reason: str | None = "its key comes again"
        elif missing:
            reason = f"no {missing}, which others have; it may be lost with some damage"
        else:
            reason = _complaint(file, sample, decode)
        if reason is None:
            seen.add(key)
            yield sample
        else:
            offset = sample[0].offset
            damages.append(Damage(shard=shard, key=key, offset=offset, reason=reason))


def _suffixes(sample: list[_Member]) -> frozenset[str]:
    return frozenset(split_member_name(m.name)[1] or PurePosixPath(m.name).suffix for m in sample)


def _complaint(file: BinaryIO, sample: list[_Member], decode: Decode) -> str | None:
    """What is wrong with a sample, or none."""
    try:
        parts = _parts(file, sample)
        metadata = parts.get("json") or parts.get("label") or b"{}"
        text, _ = decode_text_and_metadata(parts.get("text", b""), metadata)
        if not text and "text" in parts:
            return "its text is empty"
        decode(parts["image"])
    except (ValueError, DataError) as error:  # ValueError covers bad UTF-8 and bad JSON
        return str(error)
    return None


def _parts(file: BinaryIO, sample: list[_Member]) -> dict[str, bytes]:
    parts: dict[str, bytes] = {}
    for member in sample:
        _, part = split_member_name(member.name)
        if part is None:
            continue
        if part in parts:
            message = f"two members are its {part}"
            raise DataError(message)
        file.seek(member.start)
        parts[part] = file.read(member.size)
    for needed in (("image",), ("text", "json", "label")):  # captions may be in the metadata
        if not parts.keys() & needed:
            message = f"no {' or '.join(needed)}"
            raise DataError(message)
    return parts


def _mend(folder: Path, shard: str, file: BinaryIO, good: list[list[_Member]]) -> None:
    """Put a shard of the good samples in the place of a damaged one, which moves aside."""
    path = folder / shard
    aside = _free_name(folder / DAMAGED_FOLDER / shard)
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        if not good:
            path.rename(aside)
            return
        with open_whole(path) as output:
            with tarfile.open(fileobj=output, mode="w:", format=tarfile.PAX_FORMAT) as tar:
                for member in itertools.chain.from_iterable(good):
                    info = tarfile.TarInfo(member.name)
                    info.size = member.size
                    file.seek(member.start)
                    tar.addfile(info, file)
            os.link(path, aside)  # a second name first, so that no moment is without the old one
    except OSError as error:
        message = f"{path}: cannot be mended ({error}); the shard is as it was"
        raise DataError(message) from error


def _free_name(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    candidates = itertools.chain([path], numbered)
    return next(candidate for candidate in candidates if not candidate.exists())
