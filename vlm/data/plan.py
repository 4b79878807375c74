"""Which samples make up which step: a pure function of the seed and the step.

Epochs are seeded permutations laid end to end, and step `t` is the `t`-th stretch of
`global_batch` rows of that endless line. So every sample comes exactly once an epoch, no tail is
dropped or padded (a batch may straddle two epochs), and the rows of a step do not depend on the
number of ranks or workers. A run resumes from its step number alone.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

__all__ = ["Plan"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of samples over a whole training run."""

    num_samples: int
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.global_batch < 1:
            message = (
                f"a plan needs at least one sample and one row a step, got "
                f"{self.num_samples} samples and a global batch of {self.global_batch}"
            )
            raise ValueError(message)

    def rows(self, step: int) -> Int64[np.ndarray, " global_batch"]:
        """Row numbers of the samples of one global step, in order."""
        start = step * self.global_batch
        stop = start + self.global_batch
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            part = _permutation(self.num_samples, self.seed, epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def rank_rows(self, step: int, *, rank: int, size: int) -> Int64[np.ndarray, " batch"]:
        """This rank's stretch of a global step; ranks in order make up the whole.

        Raises:
            ValueError: If the global batch does not divide by the number of ranks.
        """
        batch, rest = divmod(self.global_batch, size)
        if rest:
            message = f"a global batch of {self.global_batch} does not divide over {size} ranks"
            raise ValueError(message)
        return self.rows(step)[rank * batch : (rank + 1) * batch]


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> Int64[np.ndarray, " num_samples"]:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    permutation = generator.permutation(num_samples).astype(np.int64)
    permutation.setflags(write=False)
    return permutation
