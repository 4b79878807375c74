"""What filters must know of every sample, found in processes, shard by shard: a few integers."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Bool, Int64, UInt64
from PIL import Image

from vlm.data.duplicates import HASH_DTYPE, perceptual_hash
from vlm.data.filter_rules import (
    FilterConfig,
    Traits,
    metadata_table,
    metadata_values,
    sample_rules,
)
from vlm.data.location import job_reader
from vlm.data.ngrams import caption_ngrams, caption_words
from vlm.data.reader import BadSampleError, Reader
from vlm.data.samples import Sample
from vlm.errors import DataError
from vlm.files import is_url

__all__ = ["FACTS_DTYPE", "Decode", "Measured", "ShardJob", "measure_files", "measure_shard"]

Decode = Callable[[bytes], Image.Image]
"""Image file to RGB; raises `DataError` on a bad one."""

FACTS_DTYPE: Final = np.dtype(
    [("decoded", "?"), ("image", "<u8"), ("caption", "<u8"), ("looks", HASH_DTYPE)]
)
"""Of one sample: whether it can be used, hashes of image bytes and caption (0: none), looks."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One shard of a dataset as it was when work began."""

    location: str
    fingerprint: str
    shard: int
    start: int
    """Its first row."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of the samples of one shard, in order."""

    facts: np.ndarray
    """`FACTS_DTYPE`."""
    failed: Bool[np.ndarray, "sample rule"]
    """By the rules of `sample_rules`."""
    missing: Int64[np.ndarray, " rule"]
    """How many samples do not have what a rule measures."""
    ngrams: UInt64[np.ndarray, " ngram"]
    """Hashes of the distinct n-grams of all captions, sorted; none unless they are counted."""
    counts: Int64[np.ndarray, " ngram"]


def measure_shard(
    job: ShardJob, *, decode: Decode, config: FilterConfig, spill: Path | None = None
) -> Measured:
    """Read and decode all samples of a shard.

    Args:
        job: Which shard.
        decode: Must be picklable to be used in another process.
        config: Its rules for single samples are judged here.
        spill: Folder for the n-grams of each caption, `SHARD.npz`, so that the shard need not be
            read a second time; none if n-grams are not asked for.

    Raises:
        DataError: If the shard cannot be read. Bad samples are not errors, they are not `decoded`.
    """
    reader = job_reader(job.location, job.fingerprint)
    info = reader.manifest.shards[job.shard]
    rules = sample_rules(config)
    # In a store only what lies in the shards themselves is looked at.
    table = {} if is_url(job.location) else metadata_table(Path(job.location) / info.name, config)
    facts = np.zeros(info.num_samples, dtype=FACTS_DTYPE)
    failed = np.zeros((info.num_samples, len(rules)), dtype=bool)
    missing = np.zeros(len(rules), dtype=np.int64)
    ngrams = [np.zeros(0, dtype=np.uint64)] * info.num_samples
    rows = np.arange(job.start, job.start + info.num_samples, dtype=np.int64)
    with reader:
        for place, row in enumerate(reader.in_order(rows)):
            sample = _read(reader, row)
            size = _look(facts[place : place + 1], sample, decode)
            if sample is None or size is None:
                continue
            words = caption_words(sample.text)
            values = metadata_values(sample, table, config)
            traits = Traits(width=size[0], height=size[1], num_words=len(words), values=values)
            measured = [rule.measure(traits) for rule in rules]
            failed[place] = [rule.fails(m) for rule, m in zip(rules, measured, strict=True)]
            missing += np.array([value is None for value in measured], dtype=np.int64)
            if spill is not None:
                ngrams[place] = caption_ngrams(words)
    distinct, counts = _spill(ngrams, spill, job.shard)
    return Measured(facts=facts, failed=failed, missing=missing, ngrams=distinct, counts=counts)


def _spill(
    ngrams: list[np.ndarray], folder: Path | None, shard: int
) -> tuple[UInt64[np.ndarray, " ngram"], Int64[np.ndarray, " ngram"]]:
    """Write the n-grams of each caption of a shard; the distinct ones, sorted, and their counts."""
    joined = np.concatenate([*ngrams, np.zeros(0, dtype=np.uint64)])
    if folder is not None:
        lengths = np.array([len(part) for part in ngrams], dtype=np.int64)
        np.savez(folder / f"{shard}.npz", ngrams=joined, lengths=lengths)
    return np.unique(joined, return_counts=True)


def measure_files(paths: Sequence[Path], *, decode: Decode) -> np.ndarray:
    """`FACTS_DTYPE` of image files; the caption is that of a `.txt` of the same name, if any."""
    facts = np.zeros(len(paths), dtype=FACTS_DTYPE)
    for place, path in enumerate(paths):
        beside = path.with_suffix(".txt")
        text = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else ""
        sample = Sample(key=path.stem, image=path.read_bytes(), text=text)
        _look(facts[place : place + 1], sample, decode)
    return facts


def _read(reader: Reader, row: int) -> Sample | None:
    try:
        return reader.read(row)
    except BadSampleError:
        return None


def _look(fact: np.ndarray, sample: Sample | None, decode: Decode) -> tuple[int, int] | None:
    """Fill in the one row of `fact`; the size of the image, or none if there is none."""
    if sample is None:
        return None
    fact["image"] = digest(sample.image)
    caption = " ".join(sample.text.casefold().split())
    fact["caption"] = digest(caption.encode()) if caption else 0
    try:
        image = decode(sample.image)
    except DataError:
        return None
    fact["looks"] = perceptual_hash(image)
    fact["decoded"] = True
    return image.size


def digest(data: bytes) -> int:
    """A 64-bit hash, never 0: among a billion images a wrong equality has one chance in 37."""
    return max(1, int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
