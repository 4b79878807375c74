"""Terms that remember: what they keep between steps, and who keeps it for them.

A term is configuration and stays so. What it remembers passes through it: the objective hands in
the values of the batch's samples, and gets the new ones back. Keys are `type/name`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.losses.statistics import Statistics
from vlm.types import Features

__all__ = ["Remembered", "RemembersSamples", "initial_sample_values", "initial_values"]

SampleValues = dict[str, Float[Tensor, " global_batch"]]


class Remembered(NamedTuple):
    """What a term with a memory returns."""

    value: Float[Tensor, ""]
    statistics: Statistics
    samples: SampleValues
    """New values of the samples of this batch, by the names of `sample_values`."""


@runtime_checkable
class RemembersSamples(Protocol):
    """A term that keeps numbers for every sample of the dataset."""

    @property
    def type(self) -> str: ...

    @property
    def sample_values(self) -> Mapping[str, float]:
        """The names of the numbers, each with its value for a sample not yet seen."""
        ...

    def compute_remembering(
        self, features: Features, samples: SampleValues, *, progress: float
    ) -> Remembered:
        """As `compute`, with what is remembered of the samples of this batch."""
        ...


def initial_sample_values(terms: Sequence[object]) -> dict[str, float]:
    """Everything that these terms remember of a sample, by `type/name`."""
    return {
        f"{term.type}/{name}": value
        for term in terms
        if isinstance(term, RemembersSamples)
        for name, value in term.sample_values.items()
    }


def initial_values(values: Mapping[str, float], features: Features) -> SampleValues:
    """The same values for every sample of a batch, as if none had been seen."""
    rows = features.image[:, 0].detach()
    return {name: torch.full_like(rows, value) for name, value in values.items()}
