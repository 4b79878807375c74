"""Similarities without rounding, and work shared over ranks without a trace in the result.

A coordinate of a unit row is rounded to a multiple of 2^-26, which moves a cosine by some 6e-9, a
tenth of what float32 can tell apart near 1. Then every product is a whole number of 2^-52, every
partial sum of a cosine is one of at most 2^52 (Cauchy-Schwarz), and float64 holds whole numbers
below 2^53 exactly. So a similarity comes out the same in every order of summation: on any number
of ranks and threads, in tiles of any size, by any matrix library.
"""

import math
from collections.abc import Callable, Iterable
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.distributed import World, gather_uneven_rows

__all__ = ["ROWS_AT_ONCE", "UNIT", "exact_mean", "over_rows", "rank_range", "whole_rows"]

_STEPS: Final = 2.0**26
UNIT: Final = _STEPS**2
"""The similarity of a unit row and itself, in the whole numbers of products of `whole_rows`."""
ROWS_AT_ONCE: Final = 1024
"""The fixed grid of rows on which figures are computed, whichever rank does it."""

Rows = Float[Tensor, "row dim"]


def whole_rows(rows: Rows) -> Float[Tensor, "row dim"]:
    """Rows as whole numbers of 2^-26, in float64; their products are exact.

    Args:
        rows: Unit rows, or shorter ones.

    Raises:
        ValueError: If a row is so long that products would not be exact.
    """
    whole = (rows.double() * _STEPS).round_()
    if len(whole) and float(whole.square().sum(dim=1).max()) > 1.9 * UNIT:
        message = "exact similarities need rows of length 1 or less"
        raise ValueError(message)
    return whole


def rank_range(count: int, world: World, *, at_once: int = ROWS_AT_ONCE) -> range:
    """The starts of this rank's chunks of `at_once` rows; all ranks together have each once."""
    starts = range(0, count, at_once)
    first = len(starts) * world.rank // world.size
    return starts[first : len(starts) * (world.rank + 1) // world.size]


def over_rows(
    count: int,
    world: World,
    compute: Callable[[int, int], Tensor],
    *,
    at_once: int = ROWS_AT_ONCE,
) -> Tensor:
    """`compute(start, stop)` of every chunk, the chunks shared over ranks, joined in order.

    A chunk holds the same rows whatever the number of ranks, so the result does not depend on it.

    Args:
        count: Rows in all, at least 1.
        world: Who takes part; all get the result.
        compute: From the first row and the one after the last to one row of result for each.
        at_once: Rows of a chunk.
    """
    parts = [
        compute(start, min(start + at_once, count))
        for start in rank_range(count, world, at_once=at_once)
    ]
    own = torch.cat(parts) if parts else compute(0, min(at_once, count))[:0]
    return gather_uneven_rows(own, world)


def exact_mean(values: Tensor | Iterable[float]) -> float:
    """The mean with its sum rounded once, so that the order of the values does not matter.

    Raises:
        ValueError: If there are none.
    """
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    if not listed:
        message = "the mean of no values"
        raise ValueError(message)
    return math.fsum(listed) / len(listed)
