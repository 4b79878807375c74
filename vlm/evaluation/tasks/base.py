"""What every task is given and gives back."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from vlm.config import Config
from vlm.distributed import World
from vlm.evaluation.bootstrap import Interval, Scores
from vlm.evaluation.embed import EmbeddedDataset
from vlm.evaluation.model import Subject

__all__ = ["Context", "Outcome", "TaskConfig", "TaskResult"]


class TaskConfig(Config):
    """What all kinds of tasks have."""

    data: str
    """Name of a dataset of this file."""
    name: str | None = None
    """Of the task, beside its kind; by default that of its dataset."""

    @property
    def label(self) -> str:
        return self.name or self.data


class TaskResult(Config):
    """What all kinds of results have."""

    data: str
    intervals: dict[str, Interval] = {}
    """By figure; see `bootstrap.py`."""


ResultT = TypeVar("ResultT", bound=TaskResult, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What tasks are run on."""

    subject: Subject
    datasets: dict[str, EmbeddedDataset]
    """By name."""
    world: World
    seed: int


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[ResultT]):
    """A result, and what it was made of."""

    result: ResultT
    scores: dict[str, Scores] = field(default_factory=dict)
    """By figure of the result, what it is the mean of."""
    evidence: dict[str, Tensor] = field(default_factory=dict)
    """For the report; each kind of task says what it leaves."""
