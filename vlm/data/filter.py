"""Filter files: which rows of a dataset are kept, beside its manifest, never a copy of the data.

    filters/NAME.npy    the kept row numbers, sorted int64, to be memory-mapped
    filters/NAME.json   the manifest's fingerprint, the configuration, counts, SHA-256 of the .npy

The .json is written last: without it there is no filter.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Int64

from vlm.data.duplicates import keep_first
from vlm.data.filter_rules import FilterConfig
from vlm.data.judge import Dropped, contaminated, duplicate_groups, failures
from vlm.data.location import local_folder, open_location
from vlm.data.manifest import Manifest
from vlm.data.measure import Decode
from vlm.data.remote import RemoteConfig
from vlm.data.survey import Progress, check_evaluation, measure_dataset, measure_evaluation
from vlm.errors import DataError
from vlm.files import file_sha256, open_whole

__all__ = ["FilterConfig", "FilterReport", "build_filter", "open_filter"]

FORMAT_VERSION: Final = 1
_FOLDER: Final = "filters"


@dataclass(frozen=True, kw_only=True)
class FilterReport:
    """What a filter drops and keeps."""

    path: Path
    """Of the kept rows."""
    num_samples: int
    num_kept: int
    dropped: dict[str, int]
    """By rule, how many samples it drops by itself; a sample may fail several."""


def build_filter(
    location: Path | str,
    config: FilterConfig,
    *,
    decode: Decode,
    target: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> FilterReport:
    """Judge every sample of a dataset and write which rows are kept.

    The result does not depend on the number of workers. Memory: about 210 bytes a sample
    at the peak, and 32 a distinct n-gram if they are counted.

    Args:
        location: Folder or URL of an indexed dataset.
        config: The rules.
        decode: Image file to RGB, raising `DataError`; picklable if `workers` is above 1.
        target: Folder of the filter; by default `filters` beside local shards.
        workers: Processes.
        progress: Called after each shard or piece of work.

    Raises:
        DataError: If the dataset or an evaluation folder cannot be read, a metadata field is in
            no sample, nothing would be kept, or the filter cannot be written.
    """
    if target is None:
        what = "a filter is written to a folder; name one with --out"
        target = local_folder(str(location), what=what) / _FOLDER
    manifest, shards = open_location(str(location), RemoteConfig())
    shards.close()
    for path in config.decontaminate:
        check_evaluation(path)  # before the hours that the dataset takes
    try:
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{config.name}.", dir=target) as draft:
            dropped, kept = _judge(
                manifest,
                config,
                decode=decode,
                workers=workers,
                draft=Path(draft),
                progress=progress or (lambda _stage, _done, _total: None),
            )
        rows = np.flatnonzero(kept).astype(np.int64)
        counts = {name: int(which.sum()) for name, which in dropped.items()}
        if not len(rows):
            worst = max(counts, key=lambda name: counts[name])
            message = (
                f"{location}: filter {config.name!r} would keep none of {len(kept)} samples; "
                f"{worst} drops most, {counts[worst]}; loosen it. No filter was written"
            )
            raise DataError(message)
        path = _write(target, manifest, config, rows, counts)
    except OSError as error:
        message = f"{target}: the filter cannot be made ({error}); no filter was written"
        raise DataError(message) from error
    return FilterReport(path=path, num_samples=len(kept), num_kept=len(rows), dropped=counts)


def _judge(
    manifest: Manifest,
    config: FilterConfig,
    *,
    decode: Decode,
    workers: int,
    draft: Path,
    progress: Progress,
) -> tuple[Dropped, Bool[np.ndarray, " row"]]:
    """By rule the rows it drops by itself; and the rows that are kept."""
    dataset = measure_dataset(
        manifest, config, decode=decode, workers=workers, draft=draft, progress=progress
    )
    dropped = failures(dataset, config)
    if config.decontaminate:
        evaluation = measure_evaluation(
            config.decontaminate, decode=decode, workers=workers, progress=progress
        )
        dropped |= contaminated(dataset.facts, evaluation, config)
    kept = ~np.any(list(dropped.values()), axis=0)
    for name, groups in duplicate_groups(dataset.facts, config).items():
        dropped[name] = groups != np.arange(len(groups))
        # The first that the other rules leave stays, or groups would vanish with a bad first.
        kept &= keep_first(groups, kept)
    return dropped, kept


def _write(
    target: Path,
    manifest: Manifest,
    config: FilterConfig,
    rows: Int64[np.ndarray, " kept"],
    dropped: dict[str, int],
) -> Path:
    path = target / f"{config.name}.npy"
    mark = path.with_suffix(".json")
    mark.unlink(missing_ok=True)  # an old mark must not stand beside new rows
    with open_whole(path) as file:
        np.save(file, rows)
    tree = {
        "version": FORMAT_VERSION,
        "name": config.name,
        "fingerprint": manifest.fingerprint,
        "config": config.model_dump(mode="json"),
        "num_samples": manifest.num_samples,
        "num_kept": len(rows),
        "dropped": dropped,
        "sha256": file_sha256(path),
    }
    with open_whole(mark) as file:
        file.write((json.dumps(tree, indent=1) + "\n").encode())
    return path


def open_filter(
    folder: Path,
    name: str,
    manifest: Manifest,
    *,
    location: str | None = None,
    verify: bool = True,
) -> Int64[np.ndarray, " kept"]:
    """The rows that a filter keeps, sorted and memory-mapped.

    Args:
        folder: The dataset's folder.
        name: Of the filter.
        manifest: The dataset as it is now.
        location: Folder or URL of the dataset, if not `folder`, for messages.
        verify: Compare the SHA-256, which reads 8 bytes a row; false trusts the size.

    Raises:
        DataError: If there is no such filter, it is damaged, or it was built for other shards.
    """
    path = folder / _FOLDER / f"{name}.npy"
    again = f"run `vlm data filter {location or folder} --config FILE name={name}`"
    tree = _read_mark(path.with_suffix(".json"), again)
    if tree["fingerprint"] != manifest.fingerprint:
        message = (
            f"{path}: built for a dataset of fingerprint {tree['fingerprint'][:12]}, the manifest "
            f"has {manifest.fingerprint[:12]}: its rows would be other samples; {again}"
        )
        raise DataError(message)
    try:
        rows = np.load(path, mmap_mode="r")
        whole = rows.dtype == np.int64 and rows.shape == (tree["num_kept"],)
        whole = whole and (not verify or file_sha256(path) == tree["sha256"])
    except (OSError, ValueError, EOFError) as error:
        message = f"{path}: missing or damaged ({error}); {again}"
        raise DataError(message) from error
    if not whole:
        message = f"{path}: damaged, it is not what {path.stem}.json says; {again}"
        raise DataError(message)
    return rows


def _read_mark(mark: Path, again: str) -> dict[str, Any]:
    try:
        tree = json.loads(mark.read_text(encoding="utf-8"))
        found = (tree["version"], type(tree["fingerprint"]), type(tree["num_kept"]))
        tree["sha256"]
    except FileNotFoundError as error:
        there = ", ".join(sorted(path.stem for path in mark.parent.glob("*.json"))) or "none"
        message = f"{mark}: no such filter, there are: {there}; {again}"
        raise DataError(message) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{mark}: damaged ({error!r}); {again}"
        raise DataError(message) from error
    if found != (FORMAT_VERSION, str, int):
        message = f"{mark}: version {found[0]!r} or damaged, expected {FORMAT_VERSION}; {again}"
        raise DataError(message)
    return tree
