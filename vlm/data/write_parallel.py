"""A source of pairs to a folder of shards: on many processes, and again from where it stopped.

Shard `k` holds rows `k * n` to `(k + 1) * n` of the source, so its bytes are the same whoever
writes it, and a shard that is there need not be written again.
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from vlm.data.manifest import build_manifest
from vlm.data.parallel import run_jobs, stop_if_asked
from vlm.data.samples import Sample
from vlm.data.sources.protocol import BadSample, SampleSource
from vlm.data.target import SCRATCH, begin_writing, finish_writing, hold_target, share_target
from vlm.data.write import sample_members, shard_name, write_shard
from vlm.errors import DataError
from vlm.files import open_whole

__all__ = ["SKIPPED_NAME", "WriteOptions", "WriteProgress", "WriteResult", "write_dataset"]

SKIPPED_NAME: Final = "skipped.jsonl"
Encode = Callable[[bytes], bytes]


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What, besides the source, decides about the bytes of the shards."""

    prefix: str = "shard"
    samples_per_shard: int = 1000
    """Rows of the source a shard; bad ones are missing from it."""
    skip_bad: bool = False
    """Leave bad samples out and list them, instead of stopping at the first."""
    image: dict[str, Any] = field(default_factory=dict)
    """What `encode` does, in plain JSON."""


@dataclass(frozen=True, kw_only=True)
class WriteProgress:
    """How far a call has come; rows count only what this call does."""

    shards: int
    """Done, those of earlier calls included."""
    total_shards: int
    rows: int
    remaining_rows: int


@dataclass(frozen=True, kw_only=True)
class WriteResult:
    """What the complete folder holds."""

    num_samples: int
    num_shards: int
    num_skipped: int


def write_dataset(
    open_source: Callable[[Path], SampleSource],
    folder: Path,
    *,
    options: WriteOptions,
    encode: Encode | None = None,
    workers: int = 1,
    progress: Callable[[WriteProgress], None] | None = None,
    indexing: Callable[[int, int], None] | None = None,
) -> WriteResult:
    """Write a source as shards with a manifest, or go on where an earlier call was ended.

    However often and however hard it is interrupted, and with any number of workers, the folder
    ends up with the same bytes.

    Args:
        open_source: Given a folder for what the source keeps meanwhile; called when `folder` is
            held.
        folder: Holds no shards, or those of an earlier call with the same source and options.
        options: See there.
        encode: Image file to image file, raises `DataError` on a bad one; picklable. Without it
            images are stored as they are.
        workers: Processes.
        progress: Called after every shard, and once before.
        indexing: Called with (shards done, shards in all) while the manifest is built.

    Raises:
        DataError: If the source is empty or cannot be read, a sample is bad and `skip_bad` is not
            set, all are bad, or the folder holds something else or is held by another process.
    """
    with hold_target(folder):
        source = open_source(folder / SCRATCH)
        if len(source) == 0:
            message = f"{folder}: nothing to write, the source has no samples"
            raise DataError(message)
        rows = options.samples_per_shard
        names = [shard_name(options.prefix, k) for k in range(-(-len(source) // rows))]
        description = {"source": source.facts(), "options": asdict(options)}
        begin_writing(folder, description, set(names))
        if not (folder / SKIPPED_NAME).is_file():  # written when all shards were done
            write = functools.partial(
                _write_one, source=source, folder=folder, options=options, encode=encode
            )
            sizes = [min(rows, len(source) - k * rows) for k in range(len(names))]
            _write_missing(write, folder, names, sizes, workers=workers, progress=progress)
        num_skipped = _collect_skipped(folder)
        manifest = build_manifest(folder, progress=indexing, workers=1 if workers == 1 else None)
        finish_writing(folder)
    return WriteResult(
        num_samples=manifest.num_samples,
        num_shards=len(manifest.shards),
        num_skipped=num_skipped,
    )


def _write_missing(
    write: Callable[[int], int],
    folder: Path,
    names: list[str],
    sizes: list[int],
    *,
    workers: int,
    progress: Callable[[WriteProgress], None] | None,
) -> None:
    """Write the shards that are not there; `sizes` counts the rows of each."""
    there = {path.name for path in folder.glob("*.tar")}
    missing = [
        number
        for number, name in enumerate(names)
        if name not in there and _num_lines(_bad_path(folder, number)) < sizes[number]
    ]
    done, remaining = 0, sum(sizes[number] for number in missing)
    with contextlib.closing(run_jobs(write, missing, workers=workers)) as written:
        for count, number in enumerate(itertools.chain([None], written)):
            size = 0 if number is None else sizes[number]
            done, remaining = done + size, remaining - size
            if progress is not None:
                progress(
                    WriteProgress(
                        shards=len(names) - len(missing) + count,
                        total_shards=len(names),
                        rows=done,
                        remaining_rows=remaining,
                    )
                )


def _write_one(
    number: int,
    *,
    source: SampleSource,
    folder: Path,
    options: WriteOptions,
    encode: Encode | None,
) -> int:
    """Write shard `number`, unless all its samples are bad, and return the number."""
    start = number * options.samples_per_shard
    stop = min(start + options.samples_per_shard, len(source))
    with share_target(folder):
        bad: list[dict[str, str]] = []
        samples = _good_samples(source, start, stop, encode, bad if options.skip_bad else None)

        def good() -> Iterator[dict[str, object]]:
            yield from samples
            # Before the shard gets its name: where a shard is, its bad samples are known.
            if bad:
                with open_whole(_bad_path(folder, number)) as file:
                    file.writelines(json.dumps(line).encode() + b"\n" for line in bad)

        members = good()
        first = next(members, None)
        if first is not None:
            write_shard(
                folder / shard_name(options.prefix, number), itertools.chain([first], members)
            )
    return number


def _good_samples(
    source: SampleSource,
    start: int,
    stop: int,
    encode: Encode | None,
    bad: list[dict[str, str]] | None,
) -> Iterator[dict[str, object]]:
    """Members of the good samples; the rest go to `bad`, or end it where that is none."""
    for row, found in zip(range(start, stop), source.read(start, stop), strict=True):
        # Also before the draft is opened: a worker that its parent left behind must not touch it.
        stop_if_asked()
        try:
            members = sample_members(_checked(found, encode, needs_text=source.needs_text))
        except DataError as error:
            if bad is None:
                message = (
                    f"{source.where(row)}: sample {found.key!r}: {error}. Mend it, or leave such "
                    f"samples out with --skip-bad"
                )
                raise DataError(message) from error
            bad.append({"source": source.where(row), "key": found.key, "reason": str(error)})
        else:
            yield members


def _checked(found: Sample | BadSample, encode: Encode | None, *, needs_text: bool) -> Sample:
    if isinstance(found, BadSample):
        raise DataError(found.reason)
    if not found.text and needs_text:
        message = "its caption is empty"
        raise DataError(message)
    if encode is None:
        return found
    return replace(found, image=encode(found.image))


def _bad_path(folder: Path, number: int) -> Path:
    return folder / SCRATCH / f"{number:06d}.jsonl"


def _num_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def _collect_skipped(folder: Path) -> int:
    """Gather the bad samples of all shards in `skipped.jsonl`, if there are any, and count them.

    Raises:
        DataError: If there is no good one.
    """
    path = folder / SKIPPED_NAME
    parts = sorted((folder / SCRATCH).glob("*.jsonl"), key=lambda part: int(part.stem))
    if parts and not path.is_file():
        with open_whole(path) as file:
            for part in parts:
                file.write(part.read_bytes())
    if path.is_file() and not any(folder.glob("*.tar")):
        with path.open("rb") as file:
            first = json.loads(file.readline())
        message = (
            f"{path}: every sample is bad, the first for this: {first['reason']}. Remove {folder} "
            f"to start anew"
        )
        raise DataError(message)
    return _num_lines(path)
