"""What a dataset is made of: sizes, captions, duplicates, languages, measured shard by shard."""

import contextlib
import functools
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Int64
from PIL import Image

from vlm.data.duplicates import HASH_DTYPE, Likeness, near_groups, perceptual_hash
from vlm.data.languages import language_of
from vlm.data.location import job_reader, open_location
from vlm.data.manifest import Manifest
from vlm.data.measure import Decode, digest
from vlm.data.parallel import run_in_order
from vlm.data.reader import BadSampleError, Reader
from vlm.data.remote import RemoteConfig
from vlm.data.samples import Sample
from vlm.errors import DataError

__all__ = ["DatasetStats", "measure_stats"]

_QUANTILES: Final = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_BINS: Final = 30
_MOST_COMMON: Final = 20
_MAX_DISTINCT: Final = 1_000_000
_FACTS: Final = np.dtype(
    [
        ("decoded", "?"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("image_bytes", "<u4"),
        ("characters", "<u4"),
        ("words", "<u4"),
        ("image", "<u8"),
        ("caption", "<u8"),
        ("looks", HASH_DTYPE),
    ]
)
_COUNTED: Final = ("formats", "languages", "captions", "words", "fields", "unusable")


@dataclass(frozen=True, kw_only=True)
class DatasetStats:
    """What `measure_stats` found."""

    tree: dict[str, Any]
    """Plain JSON: the content of `stats.json`."""
    pictures: list[tuple[str, str, bytes]] = field(default_factory=list)
    """Key, caption and a small WebP of some samples."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    location: str
    fingerprint: str
    run_length: int | None
    rows: Int64[np.ndarray, " row"]
    shown: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class _Part:
    facts: np.ndarray
    counts: dict[str, Counter[str]]
    pictures: list[tuple[str, str, bytes]]


def measure_stats(
    location: Path | str,
    *,
    decode: Decode,
    generator: np.random.Generator,
    limit: int | None = None,
    num_pictures: int = 24,
    workers: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> DatasetStats:
    """Read samples of a dataset, all or some drawn at random, and describe them.

    Memory is some 70 bytes a sample, and the distinct captions and words, of which at most a
    million each are counted exactly.

    Args:
        location: Folder or URL of an indexed dataset.
        decode: Image file to RGB, raising `DataError`; picklable if `workers` is above 1.
        generator: Draws the samples of `limit`, and those that are shown.
        limit: Most samples that are read.
        num_pictures: Samples that are shown.
        workers: Processes.
        progress: Called with (stage, shards done, shards in all).

    Raises:
        DataError: If the dataset cannot be opened, or a shard cannot be read.
    """
    manifest, shards = open_location(str(location), RemoteConfig())
    shards.close()
    rows = np.arange(manifest.num_samples, dtype=np.int64)
    if limit is not None and limit < len(rows):
        rows = np.sort(generator.choice(len(rows), limit, replace=False))
    shown = frozenset(generator.choice(rows, min(num_pictures, len(rows)), replace=False).tolist())
    jobs = _jobs(manifest, rows, shown)
    measure = functools.partial(_measure, decode=decode)
    parts: list[np.ndarray] = []
    counts: dict[str, Counter[str]] = {name: Counter() for name in _COUNTED}
    pictures: list[tuple[str, str, bytes]] = []
    with contextlib.closing(run_in_order(measure, jobs, workers=workers)) as found:
        for done, part in enumerate(found, start=1):
            parts.append(part.facts)
            pictures += part.pictures
            for name, counter in part.counts.items():
                counts[name].update(counter)
                _forget_rare(counts[name])
            if progress is not None:
                progress("reading shards", done, len(jobs))
    tree = _described(manifest, np.concatenate(parts), counts)
    return DatasetStats(tree=tree, pictures=pictures)


def _jobs(manifest: Manifest, rows: Int64[np.ndarray, " row"], shown: frozenset[int]) -> list[_Job]:
    """One job a shard of which something is read, in order."""
    cuts = np.searchsorted(rows, manifest.ends)[:-1]
    return [
        _Job(
            location=manifest.location,
            fingerprint=manifest.fingerprint,
            # Of a few rows here and there, each is a request of its own.
            run_length=None if len(rows) == manifest.num_samples else 1,
            rows=part,
            shown=shown.intersection(part.tolist()),
        )
        for part in np.split(rows, cuts)
        if len(part)
    ]


def _measure(job: _Job, *, decode: Decode) -> _Part:
    facts = np.zeros(len(job.rows), dtype=_FACTS)
    counts: dict[str, Counter[str]] = {name: Counter() for name in _COUNTED}
    pictures = []
    with job_reader(job.location, job.fingerprint, job.run_length) as reader:
        for place, row in enumerate(reader.in_order(job.rows)):
            found = _picture(reader, row, decode)
            if isinstance(found, str):
                counts["unusable"][found] += 1
                continue
            sample, image = found
            _note(facts[place : place + 1], sample, image)
            _count(counts, sample)
            if row in job.shown:
                pictures.append((sample.key, sample.text, _small(image)))
    return _Part(facts=facts, counts=counts, pictures=pictures)


def _picture(reader: Reader, row: int, decode: Decode) -> tuple[Sample, Image.Image] | str:
    """A sample and its image, or why it cannot be used; a shard that cannot be read is an error."""
    try:
        sample = reader.read(row)
    except BadSampleError as error:
        return str(error).removeprefix(f"{reader.where(row)}: ")
    try:
        return sample, decode(sample.image)
    except DataError as error:
        return str(error)


def _note(fact: np.ndarray, sample: Sample, image: Image.Image) -> None:
    """Fill in the one row of `fact`."""
    fact["decoded"] = True
    fact["width"], fact["height"] = image.size
    fact["image_bytes"] = len(sample.image)
    fact["characters"], fact["words"] = len(sample.text), len(sample.text.split())
    fact["image"] = digest(sample.image)
    fact["caption"] = digest(sample.text.encode())
    fact["looks"] = perceptual_hash(image)


def _count(counts: dict[str, Counter[str]], sample: Sample) -> None:
    counts["formats"][_format(sample.image)] += 1
    counts["captions"][sample.text] += 1
    counts["words"].update(set(sample.text.casefold().split()))
    counts["fields"].update(sample.metadata.keys())
    if sample.text:
        counts["languages"][language_of(sample.text)] += 1


def _format(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return image.format or "?"


def _small(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((160, 160))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def _forget_rare(counter: Counter[str]) -> None:
    """Keep memory bounded: of very many different ones the frequent half stays."""
    if len(counter) > _MAX_DISTINCT:
        for text, _ in counter.most_common()[_MAX_DISTINCT // 2 :]:
            del counter[text]


def _described(
    manifest: Manifest, facts: np.ndarray, counts: dict[str, Counter[str]]
) -> dict[str, Any]:
    good = facts[facts["decoded"]]
    width, height = good["width"].astype(np.float64), good["height"].astype(np.float64)
    numbers = {
        "width": good["width"],
        "height": good["height"],
        "aspect": width / np.maximum(height, 1),
        "megapixels": width * height / 1e6,
        "image_bytes": good["image_bytes"],
        "caption_characters": good["characters"],
        "caption_words": good["words"],
    }
    return {
        "folder": manifest.location,
        "fingerprint": manifest.fingerprint,
        "num_shards": len(manifest.shards),
        "num_bytes": int(sum(shard.num_bytes for shard in manifest.shards)),
        "num_samples": manifest.num_samples,
        "num_read": len(facts),
        "num_unusable": len(facts) - len(good),
        "num_empty_captions": int((good["characters"] == 0).sum()),
        "duplicates": _duplicates(good),
        "numbers": {name: _spread(values) for name, values in numbers.items() if len(values)},
        "counts": {
            name: [[text, count] for text, count in counter.most_common(_MOST_COMMON)]
            for name, counter in counts.items()
        },
    }


def _duplicates(good: np.ndarray) -> dict[str, int]:
    """How many samples repeat an earlier one."""
    groups = near_groups(good["looks"], Likeness()) if len(good) else np.zeros(0)
    return {
        "images": len(good) - len(np.unique(good["image"])),
        "images_alike": len(good) - len(np.unique(groups)),
        "captions": len(good) - len(np.unique(good["caption"])),
        "pairs": len(good) - len(np.unique(good[["image", "caption"]])),
    }


def _spread(values: np.ndarray) -> dict[str, Any]:
    """Mean, quantiles, and a histogram up to the 99.5% quantile, whose last bin has the rest."""
    whole = np.issubdtype(values.dtype, np.integer)
    values = values.astype(np.float64)
    low, high = float(values.min()), float(np.quantile(values, 0.995, method="higher"))
    if low == high:
        edges, heights = np.array([low, high]), np.array([len(values)])
    else:
        # Of a few whole numbers each has a bin.
        few = whole and high - low < _BINS
        bins, end = (int(high - low) + 1, high + 1) if few else (_BINS, high)
        heights, edges = np.histogram(values.clip(max=high), bins=bins, range=(low, end))
    return {
        "mean": float(values.mean()),
        "quantiles": {f"{q:g}": float(np.quantile(values, q)) for q in _QUANTILES},
        "histogram": {"edges": edges.tolist(), "counts": heights.tolist()},
    }
