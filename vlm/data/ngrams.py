"""Unigrams and bigrams of captions, counted by 64-bit hashes: no strings are kept."""

import functools
import hashlib
import string
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Int64, UInt64

__all__ = ["NEVER", "NgramCounts", "caption_ngrams", "caption_words", "rarest_counts"]

NEVER: Final = int(np.iinfo(np.int64).max)
"""The count of the rarest n-gram of a caption that has none."""

_PUNCTUATION: Final = string.punctuation + "“”‘’«»…–—、。，！？；："  # noqa: RUF001 - it is what captions hold
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)


def caption_words(text: str) -> list[str]:
    """The unigrams of a caption: its parts at white space, casefolded, outer punctuation cut."""
    words = (word.strip(_PUNCTUATION) for word in text.casefold().split())
    return [word for word in words if word]


def caption_ngrams(words: list[str]) -> UInt64[np.ndarray, " ngram"]:
    """Hashes of the unigrams and bigrams of a caption, with repetitions."""
    single = np.array([_word_hash(word) for word in words], dtype=np.uint64)
    pairs = single[:-1] * _MIX + single[1:]  # wraps around; the order of the two matters
    return np.concatenate([single, pairs])


@functools.lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


class NgramCounts:
    """How often each n-gram occurs, gathered from pieces in any order.

    Memory: 16 bytes for each distinct n-gram, twice that while pieces are merged.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[np.ndarray, np.ndarray]] = []

    def add(
        self, hashes: UInt64[np.ndarray, " ngram"], counts: Int64[np.ndarray, " ngram"]
    ) -> None:
        """Add a piece of sorted, distinct hashes."""
        if not len(hashes):
            return
        self._pieces.append((hashes, counts))
        # Merging only pieces of like size sorts each entry a logarithmic number of times.
        while len(self._pieces) > 1 and 2 * len(self._pieces[-1][0]) >= len(self._pieces[-2][0]):
            self._merge_last_two()

    def table(self) -> tuple[UInt64[np.ndarray, " ngram"], Int64[np.ndarray, " ngram"]]:
        """All hashes, sorted, and their counts."""
        while len(self._pieces) > 1:
            self._merge_last_two()
        empty = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
        return self._pieces[0] if self._pieces else empty

    def _merge_last_two(self) -> None:
        (hashes, counts), (others, more) = self._pieces.pop(), self._pieces.pop()
        joined = np.concatenate([hashes, others])
        order = np.argsort(joined, kind="stable")
        joined = joined[order]
        starts = np.flatnonzero(np.concatenate([[True], joined[1:] != joined[:-1]]))
        sums = np.add.reduceat(np.concatenate([counts, more])[order], starts)
        self._pieces.append((joined[starts], sums))


def rarest_counts(spilled: Path, table: Path) -> Int64[np.ndarray, " sample"]:
    """For each caption of a shard how often its rarest n-gram occurs; `NEVER` if it has none.

    Args:
        spilled: A `.npz` with all n-grams of the shard's captions and how many each has.
        table: Folder with `hashes.npy` and `counts.npy`, memory-mapped.
    """
    hashes = np.load(table / "hashes.npy", mmap_mode="r")
    counts = np.load(table / "counts.npy", mmap_mode="r")
    with np.load(spilled) as arrays:
        ngrams, lengths = arrays["ngrams"], arrays["lengths"]
    rarest = np.full(len(lengths), NEVER, dtype=np.int64)
    if len(ngrams):
        found = counts[np.searchsorted(hashes, ngrams)]
        filled = lengths > 0
        starts = (np.cumsum(lengths) - lengths)[filled]
        rarest[filled] = np.minimum.reduceat(found, starts)
    return rarest
