"""Which source each sample of a step comes from: a pure function of weights and position.

Position `p` of a stage takes the source in whose interval of [0, 1) the fraction of `p φ` lies,
where `φ` is the golden ratio: Weyl's sequence, which fills every interval as evenly as can be, so
that each batch, and each rank's part of it, holds the sources nearly in their proportions. With
`φ` as a fraction of 2^32, every 2^32 positions hold them exactly. How many positions before `p`
went to a source is a sum of floors that Euclid's algorithm takes in steps of log p: nothing is
stored, and a run resumes from its step number alone.

A source's samples come in the order of its own `Plan`, as often as its turn comes. Weights are
constant within a stage; a new stage begins where the curriculum says so, and where a source that
does not repeat is used up, from where on the others share its part.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Int64

from vlm.data.plan import Plan, rank_positions

__all__ = ["MixturePlan", "Stage", "build_mixture"]

_BITS: Final = 32
_MODULUS: Final = 2**_BITS
_GOLDEN: Final = 2_654_435_769  # 2^32 / φ, rounded to an odd number


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of positions with constant weights."""

    start: int
    """First position."""
    before: tuple[int, ...]
    """Samples that each source gave before."""
    bounds: tuple[int, ...]
    """Upper ends of the sources' intervals, in units of 2^-32; the last is 2^32."""

    def width(self, source: int) -> int:
        """Length of a source's interval, in units of 2^-32."""
        return self.bounds[source] - (self.bounds[source - 1] if source else 0)

    def counts(self, length: int) -> tuple[int, ...]:
        """Samples that each source has given after `length` positions of this stage."""
        below = [_count_below(bound, length) for bound in self.bounds]
        return tuple(
            before + upper - lower
            for before, upper, lower in zip(self.before, below, [0, *below[:-1]], strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class MixturePlan:
    """The order of samples from several sources; see `build_mixture`."""

    plans: tuple[Plan, ...]
    """The order inside each source."""
    global_batch: int
    seed: int
    stages: tuple[Stage, ...]
    end: int | None
    """Position at which the last source is used up, if all of them end."""

    def rank_rows(
        self, step: int, *, rank: int, size: int
    ) -> tuple[Int64[np.ndarray, " batch"], Int64[np.ndarray, " batch"]]:
        """Source numbers and rows in them of this rank's part of a global step.

        Raises:
            ValueError: If the global batch does not divide by the number of ranks, or the sources
                are used up before.
        """
        positions = rank_positions(step, self.global_batch, rank=rank, size=size)
        if len(self.plans) == 1 and self.end is None:
            rows = self.plans[0].rows_at(positions)
            return np.zeros_like(rows), rows
        return self._rows(int(positions[0]), int(positions[-1]) + 1)

    def counts(self, step: int) -> tuple[int, ...]:
        """Samples that each source has given before a step."""
        stage = self._stage(step * self.global_batch)
        return stage.counts(step * self.global_batch - stage.start)

    def _stage(self, position: int) -> Stage:
        return self.stages[bisect_right(self.stages, position, key=lambda s: s.start) - 1]

    def _rows(
        self, start: int, stop: int
    ) -> tuple[Int64[np.ndarray, " batch"], Int64[np.ndarray, " batch"]]:
        if self.end is not None and stop > self.end:
            message = f"the sources end at position {self.end}, {stop} was asked for"
            raise ValueError(message)
        parts = []
        while start < stop:
            stage = self._stage(start)
            later = bisect_right(self.stages, start, key=lambda s: s.start)
            limit = self.stages[later].start if later < len(self.stages) else stop
            end = min(stop, limit)
            parts.append(self._rows_of_stage(stage, start - stage.start, end - stage.start))
            start = end
        return np.concatenate([part[0] for part in parts]), np.concatenate([p[1] for p in parts])

    def _rows_of_stage(
        self, stage: Stage, start: int, stop: int
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        fractions = _fractions(start, stop)
        source = np.searchsorted(np.array(stage.bounds), fractions, side="right")
        rows = np.empty(len(source), dtype=np.int64)
        given = stage.counts(start)
        for number, plan in enumerate(self.plans):
            own = np.flatnonzero(source == number)
            if len(own):
                positions = given[number] + np.arange(len(own), dtype=np.int64)
                rows[own] = plan.rows_at(positions)
        return source.astype(np.int64), rows


def build_mixture(
    plans: Sequence[Plan],
    *,
    weights: Sequence[float],
    repeats: Sequence[bool],
    curriculum: Sequence[tuple[int, Sequence[float]]] = (),
    global_batch: int,
    seed: int,
) -> MixturePlan:
    """Lay the stages of a run end to end.

    Args:
        plans: The order inside each source.
        weights: Of the sources, at least 0 and one of them above; from the first step on.
        repeats: Whether a source begins anew when all its samples came; else it ends.
        curriculum: Ascending steps, and the weights from there on.
        global_batch: Samples of one step.
        seed: Of the run.
    """
    changes = [(step * global_batch, tuple(values)) for step, values in curriculum]
    limits = [
        None if repeat else plan.num_samples for plan, repeat in zip(plans, repeats, strict=True)
    ]
    stages: list[Stage] = []
    position, counts, wanted = 0, (0,) * len(plans), tuple(weights)
    while True:
        while changes and changes[0][0] <= position:
            wanted = changes.pop(0)[1]
        active = [
            weight if limit is None or count < limit else 0.0
            for weight, limit, count in zip(wanted, limits, counts, strict=True)
        ]
        if sum(active) <= 0:
            return _mixture(plans, global_batch, seed, stages, position)
        stage = Stage(start=position, before=counts, bounds=_bounds(active))
        stages.append(stage)
        lengths = [changes[0][0] - position] if changes else []
        lengths += [
            _positions_until(stage, number, limit)
            for number, limit in enumerate(limits)
            # A weight may be too small for 2^-32 of a batch; such a source never comes.
            if limit is not None and stage.width(number) > 0
        ]
        if not lengths:
            return _mixture(plans, global_batch, seed, stages, None)
        position, counts = position + min(lengths), stage.counts(min(lengths))


def _mixture(
    plans: Sequence[Plan], global_batch: int, seed: int, stages: list[Stage], end: int | None
) -> MixturePlan:
    return MixturePlan(
        plans=tuple(plans), global_batch=global_batch, seed=seed, stages=tuple(stages), end=end
    )


def _bounds(weights: Sequence[float]) -> tuple[int, ...]:
    shares = np.cumsum(np.asarray(weights, dtype=np.float64)) / sum(weights)
    bounds = [round(float(share) * _MODULUS) for share in shares]
    # What rounding left over goes to the last source that has a part at all.
    last = max(number for number, weight in enumerate(weights) if weight > 0)
    return tuple(bounds[:last] + [_MODULUS] * (len(bounds) - last))


def _fractions(start: int, stop: int) -> Int64[np.ndarray, " n"]:
    numbers = np.arange(start, stop, dtype=np.int64).astype(np.uint64)
    # Overflow is modulo 2^64, of which 2^32 is a divisor.
    return ((numbers * np.uint64(_GOLDEN)) % np.uint64(_MODULUS)).astype(np.int64)


def _count_below(bound: int, length: int) -> int:
    """How many of the first `length` fractions are below `bound`."""
    if bound == _MODULUS:
        return length
    shifted = _floor_sum(length, _GOLDEN, _MODULUS - bound)
    return length + _floor_sum(length, _GOLDEN, 0) - shifted


def _floor_sum(length: int, factor: int, offset: int) -> int:
    """The sum of ⌊(factor k + offset) / 2^32⌋ over k in [0, length), by Euclid's algorithm."""
    total, modulus = 0, _MODULUS
    while length:
        quotient, factor = divmod(factor, modulus)
        total += quotient * (length * (length - 1) // 2)
        quotient, offset = divmod(offset, modulus)
        total += quotient * length
        # Count the lattice points below the line by columns instead of rows.
        length, offset = divmod(factor * length + offset, modulus)
        factor, modulus = modulus, factor
    return total


def _positions_until(stage: Stage, source: int, limit: int) -> int:
    """Positions of the stage until a source has given `limit` samples."""
    low, high = 0, 1
    while stage.counts(high)[source] < limit:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if stage.counts(middle)[source] < limit else (low, middle)
    return high
