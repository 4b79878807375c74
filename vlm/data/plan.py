"""Which samples make up which step: a pure function of the seed and the step.

Epochs are laid end to end on an endless line of positions, and step `t` is its `t`-th stretch of
`global_batch` positions. So every sample comes exactly once an epoch, no tail is dropped or padded
(a batch may straddle two epochs), and the rows of a step do not depend on the number of ranks or
workers. A run resumes from its step number alone.

Nothing is stored: a row is computed from its position, in three bijections.

1. Lanes. Within an epoch, `run_length` steps form a tile of `run_length x global_batch` positions,
   read column by column: place `i` of the batch (a lane) takes one run of neighbours over those
   steps. A rank owns neighbouring lanes, so it alone reads the runs of its lanes.
2. Runs. The samples as stored are cut into runs of `run_length` neighbours, which come in a
   seeded order. The last run may be short; its place among the others is drawn as well.
3. Rows. The samples of one run come in a seeded order of their own.

With `run_length` 1 this is a shuffle of all samples. With 64, a batch still holds samples from
`global_batch` runs drawn from the whole dataset, and each run is read once, whole, by one rank.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from vlm.data.permute import mix, permute

__all__ = ["Plan", "rank_positions", "usual_run_length"]

_UNIFORM_UP_TO = 1_000_000
_RUN_LENGTH = 64


def usual_run_length(num_samples: int, *, remote: bool = False) -> int:
    """1 up to a million local samples, whose shards a page cache may hold; 64 otherwise."""
    return 1 if num_samples <= _UNIFORM_UP_TO and not remote else _RUN_LENGTH


def rank_positions(
    step: int, global_batch: int, *, rank: int, size: int
) -> Int64[np.ndarray, " batch"]:
    """A rank's stretch of a global step, as positions on the endless line of samples.

    Raises:
        ValueError: If the global batch does not divide by the number of ranks.
    """
    batch, rest = divmod(global_batch, size)
    if rest:
        message = f"a global batch of {global_batch} does not divide over {size} ranks"
        raise ValueError(message)
    start = step * global_batch + rank * batch
    return np.arange(start, start + batch, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of samples over a whole training run."""

    num_samples: int
    global_batch: int
    seed: int
    run_length: int = 1
    """Neighbours in storage that are read together."""

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.global_batch < 1 or self.run_length < 1:
            message = (
                f"a plan needs at least one sample, one row a step and one row a run, got "
                f"{self.num_samples} samples, a global batch of {self.global_batch} and runs of "
                f"{self.run_length}"
            )
            raise ValueError(message)

    def rows(self, step: int) -> Int64[np.ndarray, " global_batch"]:
        """Row numbers of the samples of one global step, in order."""
        return self.rank_rows(step, rank=0, size=1)

    def rank_rows(self, step: int, *, rank: int, size: int) -> Int64[np.ndarray, " batch"]:
        """This rank's stretch of a global step; ranks in order make up the whole.

        Time and memory depend on the stretch alone.

        Raises:
            ValueError: If the global batch does not divide by the number of ranks.
        """
        return self.rows_at(rank_positions(step, self.global_batch, rank=rank, size=size))

    def rows_at(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Rows of ascending positions on the endless line of samples."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        first, last = int(epochs[0]), int(epochs[-1])
        places = self._place_on_runs(offsets)
        if first == last:
            return self._row_of(places, mix(self.seed, first))
        parts = [
            self._row_of(places[epochs == epoch], mix(self.seed, epoch))
            for epoch in range(first, last + 1)
        ]
        return np.concatenate(parts)

    def _place_on_runs(self, position: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """From the order of steps to the order of runs, both within an epoch."""
        tile, place = np.divmod(position, self.global_batch * self.run_length)
        first = tile * self.global_batch * self.run_length
        # The last tile has fewer steps; what does not fill a step of it stays where it is.
        steps = np.minimum(self.run_length, (self.num_samples - first) // self.global_batch)
        step, lane = np.divmod(place, self.global_batch)
        return np.where(step < steps, first + lane * steps + step, position)

    def _row_of(self, place: Int64[np.ndarray, " n"], key: int) -> Int64[np.ndarray, " n"]:
        """From the order of runs to storage."""
        num_whole, short = divmod(self.num_samples, self.run_length)
        # Where the short run lies among the others; beyond all of them if there is none.
        slot_of_short = mix(key, 1) % (num_whole + 1) if short else num_whole
        start_of_short = slot_of_short * self.run_length
        slot, inside = np.divmod(
            np.where(place < start_of_short + short, place, place + (-short) % self.run_length),
            self.run_length,
        )
        is_short = slot == slot_of_short
        whole = ~is_short
        run = np.full_like(place, num_whole)
        if num_whole:
            numbers = slot[whole] - (slot[whole] > slot_of_short)
            run[whole] = permute(numbers, num_whole, mix(key, 2))
        keys = run.astype(np.uint64) + np.uint64(mix(key, 3))
        inside[whole] = permute(inside[whole], self.run_length, keys[whole])
        inside[is_short] = permute(inside[is_short], max(short, 1), keys[is_short])
        return run * self.run_length + inside
