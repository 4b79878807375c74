"""Whole datasets measured in processes, shard by shard: to be filtered, or to evaluate on."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from jaxtyping import Bool, Int64

from vlm.data.filter_rules import FilterConfig, sample_rules
from vlm.data.manifest import Manifest, holds_shards, open_manifest
from vlm.data.measure import (
    FACTS_DTYPE,
    Decode,
    ShardJob,
    measure_files,
    measure_shard,
)
from vlm.data.ngrams import NgramCounts, rarest_counts
from vlm.data.parallel import run_in_order
from vlm.data.samples import IMAGE_EXTENSIONS
from vlm.errors import DataError

__all__ = ["Dataset", "Progress", "check_evaluation", "measure_dataset", "measure_evaluation"]

_FILES_A_JOB: Final = 500

Job = TypeVar("Job")
Result = TypeVar("Result")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is known of all samples, by row."""

    facts: np.ndarray
    failed: Bool[np.ndarray, "row rule"]
    rarest: Int64[np.ndarray, " row"] | None
    """How often the rarest n-gram of the caption occurs in all captions, if they were counted."""
    most_frequent: int
    """How often the last of the `max_ngrams` most frequent n-grams occurs, at least 0."""


def measure_dataset(
    manifest: Manifest,
    config: FilterConfig,
    *,
    decode: Decode,
    workers: int,
    draft: Path,
    progress: Progress,
) -> Dataset:
    """Read every shard once; then, if n-grams are counted, what was noted of their captions.

    Args:
        manifest: The dataset.
        config: The rules.
        decode: Image file to RGB, raising `DataError`; picklable if `workers` is above 1.
        workers: Processes.
        draft: An empty folder for the n-grams of all captions, about 300 bytes a caption.
        progress: Called after each shard.

    Raises:
        DataError: If a shard cannot be read, or no sample has a field that a rule asks for.
    """
    rules = sample_rules(config)
    facts = np.zeros(manifest.num_samples, dtype=FACTS_DTYPE)
    failed = np.zeros((manifest.num_samples, len(rules)), dtype=bool)
    missing = np.zeros(len(rules), dtype=np.int64)
    ngrams = NgramCounts()
    jobs: list[ShardJob] = shard_jobs(manifest)
    spill = draft if config.counts_ngrams else None
    measure = functools.partial(measure_shard, decode=decode, config=config, spill=spill)
    measured = _told(measure, jobs, workers, "reading shards", progress)
    for job, found in zip(jobs, measured, strict=True):
        rows = slice(job.start, job.start + len(found.facts))
        facts[rows], failed[rows] = found.facts, found.failed
        missing += found.missing
        ngrams.add(found.ngrams, found.counts)
    for rule, count in zip(rules, missing, strict=True):
        if count and count == facts["decoded"].sum():
            message = (
                f"{manifest.location}: no sample has {rule.name} as a number, neither in its "
                f".json nor in a .parquet beside its local shard; correct the field's name, or "
                f"leave the rule out"
            )
            raise DataError(message)
    rarest: Int64[np.ndarray, " row"] | None = None
    most_frequent = 0
    if spill is not None:
        rarest, most_frequent = _rarest(ngrams, jobs, config, workers, draft, progress)
    return Dataset(facts=facts, failed=failed, rarest=rarest, most_frequent=most_frequent)


def _rarest(
    ngrams: NgramCounts,
    jobs: list[ShardJob],
    config: FilterConfig,
    workers: int,
    draft: Path,
    progress: Progress,
) -> tuple[Int64[np.ndarray, " row"], int]:
    hashes, counts = ngrams.table()
    np.save(draft / "hashes.npy", hashes)
    np.save(draft / "counts.npy", counts)
    most_frequent = 0
    if config.max_ngrams is not None and config.max_ngrams < len(counts):
        place = len(counts) - config.max_ngrams
        most_frequent = int(np.partition(counts, place)[place])
    spilled = [draft / f"{job.shard}.npz" for job in jobs]
    count = functools.partial(rarest_counts, table=draft)
    parts = list(_told(count, spilled, workers, "looking up n-grams", progress))
    return np.concatenate(parts), most_frequent


def measure_evaluation(
    folders: Sequence[Path], *, decode: Decode, workers: int, progress: Progress
) -> np.ndarray:
    """`FACTS_DTYPE` of all samples of folders of shards, or of images at any depth.

    An image that cannot be decoded can still be found by its bytes. See `check_evaluation`.
    """
    return np.concatenate(
        [_measure_folder(folder, decode, workers, progress) for folder in folders]
    )


def check_evaluation(folder: Path) -> None:
    """See that a folder can be measured.

    Raises:
        DataError: If it has neither shards nor images, or its shards are not indexed.
    """
    if holds_shards(folder):
        open_manifest(folder)
    elif not any(_is_image(path) for path in folder.rglob("*")):
        message = (
            f"decontaminate: {folder}: neither .tar shards nor images here "
            f"(.{', .'.join(IMAGE_EXTENSIONS)}); correct the path"
        )
        raise DataError(message)


def _measure_folder(folder: Path, decode: Decode, workers: int, progress: Progress) -> np.ndarray:
    stage = f"reading {folder}"
    if holds_shards(folder):
        jobs = shard_jobs(open_manifest(folder))
        measure = functools.partial(measure_shard, decode=decode, config=FilterConfig())
        parts = [found.facts for found in _told(measure, jobs, workers, stage, progress)]
    else:
        paths = sorted(p for p in folder.rglob("*") if _is_image(p))
        pieces = [paths[i : i + _FILES_A_JOB] for i in range(0, len(paths), _FILES_A_JOB)]
        look = functools.partial(measure_files, decode=decode)
        parts = list(_told(look, pieces, workers, stage, progress))
    return np.concatenate(parts)


def _told(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    stage: str,
    progress: Progress,
) -> Iterator[Result]:
    """Results in the order of the jobs; each is told."""
    with contextlib.closing(run_in_order(function, jobs, workers=workers)) as results:
        for done, result in enumerate(results, start=1):
            yield result
            progress(stage, done, len(jobs))


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and path.is_file()


def shard_jobs(manifest: Manifest) -> list[ShardJob]:
    """One job a shard, in order."""
    return [
        ShardJob(
            location=manifest.location,
            fingerprint=manifest.fingerprint,
            shard=number,
            start=int(end) - shard.num_samples,
        )
        for number, (shard, end) in enumerate(zip(manifest.shards, manifest.ends, strict=True))
    ]
