"""Images that look alike: a perceptual hash, and all near pairs without comparing all pairs.

Two images are near duplicates if their 64 bits differ in a few places and their colours in four
quarters hardly differ. The bits alone take for one what shares its outline: flags, round faces.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from jaxtyping import Bool, Int64
from PIL import Image
from pydantic import Field

from vlm.config import Config

__all__ = [
    "HASH_DTYPE",
    "Likeness",
    "connected_groups",
    "distinct_rows",
    "keep_first",
    "near_any",
    "near_groups",
    "near_pairs",
    "perceptual_hash",
]

HASH_DTYPE: Final = np.dtype([("bits", "<u8"), ("colours", "u1", (12,))])
"""Of one image: 64 bits of its cosine transform, and mean red, green and blue of its quarters."""

_SIDE: Final = 32
_KEPT: Final = 8
_LUMA: Final = np.array([0.299, 0.587, 0.114])
_NOISE: Final = 3.0
_TABLES: Final = 1000

Pairs = tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]


class Likeness(Config):
    """How much two images may differ and still count as one."""

    max_distance: int = Field(4, ge=0, le=16)
    """Bits of 64 that may differ; 4 bears JPEG at quality 80 and halving."""
    max_colour_difference: int = Field(8, ge=0, le=255)
    """Gray levels, 0 to 255, by which a channel of a quarter may differ; 255 ignores colours."""


def _cosines() -> np.ndarray:
    """The first rows of the orthonormal DCT-II of 32 points."""
    frequency, place = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None]
    cosines = np.cos(np.pi * (2 * place + 1) * frequency / (2 * _SIDE)) * math.sqrt(2 / _SIDE)
    cosines[0] /= math.sqrt(2)
    return cosines


_COSINES: Final = _cosines()


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """What stays of an image when it is scaled or compressed anew.

    The image is squashed to 32 x 32. Of the 8 x 8 lowest frequencies of its luma a bit says
    whether they are above their median. Symmetric images have zeros for half of their
    coefficients, whose signs are noise: a median below the noise is raised to it. Of 7,498 emoji
    drawings none is then more than 4 bits from itself as JPEG of quality 80; with the plain
    median about 12% are.

    Args:
        image: RGB, of any size.

    Returns:
        One `HASH_DTYPE`, of shape ().
    """
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    pixels = np.asarray(small, dtype=np.float64)  # [32 32 3]
    coefficients = (_COSINES @ (pixels @ _LUMA) @ _COSINES.T).ravel()
    bits = coefficients > max(float(np.median(coefficients[1:])), _NOISE)
    bits[0] = coefficients[0] > 128 * _SIDE  # the mean gray level
    half = _SIDE // 2
    quarters = pixels.reshape(2, half, 2, half, 3).mean(axis=(1, 3))
    found = np.zeros((), dtype=HASH_DTYPE)
    found["bits"] = np.packbits(bits).view("<u8")[0]
    found["colours"] = np.rint(quarters).astype(np.uint8).ravel()
    return found


def near_groups(hashes: np.ndarray, likeness: Likeness) -> Int64[np.ndarray, " row"]:
    """For each row the smallest row that a chain of near duplicates leads to.

    Args:
        hashes: Rows of `HASH_DTYPE`.
        likeness: What is near.
    """
    colours = np.ascontiguousarray(hashes["colours"]).view("<u4")
    firsts, inverse = distinct_rows(hashes["bits"], *colours.T)
    groups = connected_groups(len(firsts), near_pairs(hashes[firsts], likeness))
    smallest = firsts.copy()
    np.minimum.at(smallest, groups, firsts)
    return smallest[groups[inverse]]


def near_pairs(hashes: np.ndarray, likeness: Likeness) -> Iterator[Pairs]:
    """All pairs of near rows, in pieces; a pair may come more than once, in either order.

    Rows that agree in a few of the bands of bits are neighbours in a sorted table; only those are
    compared (multi-index hashing, arXiv:1307.2982, here with bands taken several at a time).
    """
    level = hashes["colours"][:, 1].astype(np.int16)
    for mask in _band_masks(len(hashes), likeness.max_distance):
        keys = hashes["bits"] & mask
        # With colours in order too, a row is done at the first whose colour is too far.
        order = np.lexsort((level, keys)).astype(np.int64)
        keys, levels = keys[order], level[order]
        left = np.arange(len(order))
        for shift in itertools.count(1):
            left = left[: np.searchsorted(left, len(order) - shift)]
            right = left + shift
            near = levels[right] - levels[left] <= likeness.max_colour_difference
            left = left[near & (keys[right] == keys[left])]
            if not len(left):
                break
            one, other = order[left], order[left + shift]
            near = _are_near(hashes[one], hashes[other], likeness)
            yield one[near], other[near]


def near_any(
    hashes: np.ndarray, others: np.ndarray, likeness: Likeness
) -> Bool[np.ndarray, " row"]:
    """Whether each row of `hashes` is near to any of `others`."""
    found = np.zeros(len(hashes), dtype=bool)
    for mask in _band_masks(len(hashes) + len(others), likeness.max_distance):
        keys = others["bits"] & mask
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        rows = np.flatnonzero(~found)
        wanted = hashes["bits"][rows] & mask
        place = np.searchsorted(keys, wanted, side="left")
        end = np.searchsorted(keys, wanted, side="right")
        while len(rows):
            open_ = (place < end) & ~found[rows]
            rows, place, end = rows[open_], place[open_], end[open_]
            found[rows] = _are_near(hashes[rows], others[order[place]], likeness)
            place = place + 1
    return found


def _are_near(one: np.ndarray, other: np.ndarray, likeness: Likeness) -> Bool[np.ndarray, " row"]:
    distance = np.bitwise_count(one["bits"] ^ other["bits"])
    levels = one["colours"].astype(np.int16) - other["colours"]
    colours = np.abs(levels).max(axis=1, initial=0)
    return (distance <= likeness.max_distance) & (colours <= likeness.max_colour_difference)


def _band_masks(count: int, distance: int) -> list[np.uint64]:
    """Masks such that rows at most `distance` bits apart agree under at least one of them.

    Of m bands of bits, `distance` differences leave m - distance untouched, so every choice of so
    many bands is a mask. More bands: more tables to sort, fewer rows that agree by chance.
    """

    def cost(bands: int) -> float:
        tables = math.comb(bands, distance)
        # Hashes of real images are far from uniform: reckon with half of the bits.
        bits = 32 * (bands - distance) / bands
        return math.inf if tables > _TABLES else tables * (20 * count + count**2 / 2**bits)

    if distance == 0:
        return [np.uint64(2**64 - 1)]
    bands = min(range(distance + 1, 2 * distance + 4), key=cost)
    edges = [64 * band // bands for band in range(bands + 1)]
    parts = [2**end - 2**start for start, end in itertools.pairwise(edges)]
    chosen = itertools.combinations(parts, bands - distance)
    return [np.uint64(sum(mask)) for mask in chosen]


def connected_groups(count: int, pairs: Iterable[Pairs]) -> Int64[np.ndarray, " row"]:
    """Union-find: for each of `count` rows the smallest row that pairs connect it with."""
    parents = np.arange(count, dtype=np.int64)
    for left, right in pairs:
        while len(left):
            left, right = _roots(parents, left), _roots(parents, right)
            apart = left != right
            left, right = left[apart], right[apart]
            # The larger root points to the smaller; what loses the race comes again.
            np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))
    return _roots(parents, np.arange(count, dtype=np.int64))


def _roots(
    parents: Int64[np.ndarray, " row"], rows: Int64[np.ndarray, " some"]
) -> Int64[np.ndarray, " some"]:
    found = parents[rows]
    while True:
        above = parents[found]
        if np.array_equal(above, found):
            parents[rows] = found  # so that the way is short next time
            return found
        found = above


def distinct_rows(
    *columns: np.ndarray,
) -> tuple[Int64[np.ndarray, " distinct"], Int64[np.ndarray, " row"]]:
    """The first row of each distinct combination of values, and for each row which one it has."""
    order = np.lexsort(columns[::-1]).astype(np.int64)
    starts = np.zeros(len(order), dtype=bool)
    starts[:1] = True
    for column in columns:
        values = column[order]
        starts[1:] |= values[1:] != values[:-1]
    inverse = np.empty(len(order), dtype=np.int64)
    inverse[order] = np.cumsum(starts) - 1
    return order[starts], inverse  # the sort is stable, so the first of a run is the smallest row


def keep_first(
    groups: Int64[np.ndarray, " row"], alive: Bool[np.ndarray, " row"]
) -> Bool[np.ndarray, " row"]:
    """Of the rows that are alive, the first of each group."""
    rows = np.flatnonzero(alive)
    _, places = np.unique(groups[rows], return_index=True)
    kept = np.zeros(len(groups), dtype=bool)
    kept[rows[places]] = True
    return kept
