"""Seeded permutations of any size that are computed, not stored.

A domain of `n` is laid out as a table of about √n by √n places. Rounds in turn shift the column by
a hash of the row and the row by a hash of the column, each modulo its own size: a Feistel network
(Luby and Rackoff 1988) over numbers that need not be powers of two (Black and Rogaway 2002). The
table has fewer than √n places too many; what falls on one walks on along its cycle until it is
inside, so the result is a permutation of the domain itself. Memory does not depend on its size.
"""

import math
from typing import Final

import numpy as np
from jaxtyping import Int64, UInt64

__all__ = ["mix", "permute"]

_ROUNDS: Final = 8
_WORD: Final = 2**64
_GOLDEN: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB


def mix(*words: int) -> int:
    """A 64-bit hash of integers, each taken modulo 2^64."""
    state = 0
    for word in words:
        state = ((state ^ (word % _WORD)) + _GOLDEN) % _WORD
        state = ((state ^ (state >> 30)) * _FIRST) % _WORD
        state = ((state ^ (state >> 27)) * _SECOND) % _WORD
        state ^= state >> 31
    return state


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
    height = math.isqrt(domain - 1) + 1
    width = -(-domain // height)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape)
    found = _shift_in_turn(index.astype(np.uint64), keys, height, width)
    outside = np.flatnonzero(found >= domain)
    while len(outside):
        found[outside] = _shift_in_turn(found[outside], keys[outside], height, width)
        outside = outside[found[outside] >= domain]
    return found.astype(np.int64)


def _shift_in_turn(
    places: UInt64[np.ndarray, " n"], keys: UInt64[np.ndarray, " n"], height: int, width: int
) -> UInt64[np.ndarray, " n"]:
    row, column = np.divmod(places, np.uint64(width))
    for number in range(_ROUNDS):
        # Scalars would warn of the overflow that arrays take silently.
        round_keys = keys + np.uint64((number + 1) * _GOLDEN % _WORD)
        if number % 2:
            row = (row + _hash(column, round_keys, keys) % np.uint64(height)) % np.uint64(height)
        else:
            column = (column + _hash(row, round_keys, keys) % np.uint64(width)) % np.uint64(width)
    return row * np.uint64(width) + column


def _hash(
    words: UInt64[np.ndarray, " n"],
    round_keys: UInt64[np.ndarray, " n"],
    keys: UInt64[np.ndarray, " n"],
) -> UInt64[np.ndarray, " n"]:
    return _finalise(_finalise(words ^ round_keys) + keys)


def _finalise(words: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_FIRST)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_SECOND)
    return words ^ (words >> np.uint64(31))
