"""Whole datasets measured in processes, shard by shard: to be filtered, or to evaluate on."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Bool, Int64

from vlm.data.filter_rules import FilterConfig, sample_rules
from vlm.data.manifest import Manifest, open_manifest
from vlm.data.measure import (
    FACTS_DTYPE,
    Decode,
    ShardJob,
    measure_files,
    measure_shard,
    run_jobs,
)
from vlm.data.ngrams import NgramCounts, rarest_counts
from vlm.data.samples import IMAGE_EXTENSIONS
from vlm.errors import DataError

__all__ = ["Dataset", "Progress", "measure_dataset", "measure_evaluation"]

_FILES_A_JOB: Final = 500

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
    for done, (number, found) in enumerate(run_jobs(measure, jobs, workers), start=1):
        rows = slice(jobs[number].start, jobs[number].start + len(found.facts))
        facts[rows], failed[rows] = found.facts, found.failed
        missing += found.missing
        ngrams.add(found.ngrams, found.counts)
        progress("reading shards", done, len(jobs))
    for rule, count in zip(rules, missing, strict=True):
        if count and count == facts["decoded"].sum():
            message = (
                f"{manifest.folder}: no sample has {rule.name}, neither in its .json nor in a "
                f".parquet beside its shard; correct the field's name, or leave the rule out"
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
    parts: dict[int, np.ndarray] = {}
    spilled = [draft / f"{job.shard}.npz" for job in jobs]
    count = functools.partial(rarest_counts, table=draft)
    for done, (number, part) in enumerate(run_jobs(count, spilled, workers), start=1):
        parts[number] = part
        progress("looking up n-grams", done, len(jobs))
    return np.concatenate([parts[number] for number in range(len(jobs))]), most_frequent


def measure_evaluation(
    folders: Sequence[Path], *, decode: Decode, workers: int, progress: Progress
) -> np.ndarray:
    """`FACTS_DTYPE` of all samples of folders of shards, or of images at any depth.

    An image that cannot be decoded can still be found by its bytes.

    Raises:
        DataError: If a folder has neither shards nor images, or its shards are not indexed.
    """
    return np.concatenate(
        [_measure_folder(folder, decode, workers, progress) for folder in folders]
    )


def _measure_folder(folder: Path, decode: Decode, workers: int, progress: Progress) -> np.ndarray:
    stage = f"reading {folder}"
    parts: dict[int, np.ndarray] = {}
    if any(folder.glob("*.tar")):
        jobs = shard_jobs(open_manifest(folder))
        measure = functools.partial(measure_shard, decode=decode, config=FilterConfig())
        for done, (number, found) in enumerate(run_jobs(measure, jobs, workers), start=1):
            parts[number] = found.facts
            progress(stage, done, len(jobs))
    else:
        paths = sorted(p for p in folder.rglob("*") if _is_image(p))
        pieces = [paths[i : i + _FILES_A_JOB] for i in range(0, len(paths), _FILES_A_JOB)]
        look = functools.partial(measure_files, decode=decode)
        for done, (number, facts) in enumerate(run_jobs(look, pieces, workers), start=1):
            parts[number] = facts
            progress(stage, done, len(pieces))
    if not parts:
        message = (
            f"decontaminate: {folder}: neither .tar shards nor images here "
            f"(.{', .'.join(IMAGE_EXTENSIONS)}); correct the path"
        )
        raise DataError(message)
    return np.concatenate([parts[number] for number in range(len(parts))])


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and path.is_file()


def shard_jobs(manifest: Manifest) -> list[ShardJob]:
    """One job a shard, in order."""
    jobs, start = [], 0
    for number, shard in enumerate(manifest.shards):
        jobs.append(
            ShardJob(
                folder=manifest.folder,
                fingerprint=manifest.fingerprint,
                shard=number,
                start=start,
            )
        )
        start += shard.num_samples
    return jobs
