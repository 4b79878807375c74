"""Seeded permutations of any size that are computed, not stored.

A balanced Feistel network (Luby and Rackoff 1988) permutes the smallest power of four that holds
the domain; whatever falls outside walks on along its cycle until it is inside (Black and Rogaway
2002), so the result is a permutation of the domain itself. Memory does not depend on its size.
"""

from typing import Final

import numpy as np
from jaxtyping import Int64, UInt64

__all__ = ["mix", "permute"]

_ROUNDS: Final = 8
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_WORD: Final = 2**64


def mix(*words: int) -> int:
    """A 64-bit hash of integers, each taken modulo 2^64."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = _finalise(state ^ np.uint64(word % _WORD))
    return int(state[0])


def permute(
    index: Int64[np.ndarray, " n"], domain: int, key: UInt64[np.ndarray, " n"] | int
) -> Int64[np.ndarray, " n"]:
    """Where a seeded permutation of `range(domain)` sends each index.

    Args:
        index: In [0, domain).
        domain: At least 1.
        key: Chooses the permutation, for all indices together or one by one.
    """
    if domain == 1:
        return np.zeros_like(index)
    half = np.uint64(((domain - 1).bit_length() + 1) // 2)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape)
    found = _feistel(index.astype(np.uint64), keys, half)
    outside = np.flatnonzero(found >= domain)
    while len(outside):
        found[outside] = _feistel(found[outside], keys[outside], half)
        outside = outside[found[outside] >= domain]
    return found.astype(np.int64)


def _feistel(
    values: UInt64[np.ndarray, " n"], keys: UInt64[np.ndarray, " n"], half: np.uint64
) -> UInt64[np.ndarray, " n"]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for number in range(_ROUNDS):
        # Scalars would warn of the overflow that arrays take silently.
        round_keys = keys + np.uint64((number + 1) * int(_GOLDEN) % _WORD)
        left, right = right, left ^ (_finalise(_finalise(right ^ round_keys) + keys) & mask)
    return (left << half) | right


def _finalise(words: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
