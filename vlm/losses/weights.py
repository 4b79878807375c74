"""What a term weighs in the total, over training."""

import itertools
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from vlm.config import Config

__all__ = ["WeightSchedule", "WeightedTerm"]


class WeightSchedule(Config):
    """A weight that moves linearly between points of training."""

    model_config = ConfigDict(allow_inf_nan=False)

    at: list[Annotated[float, Field(ge=0, le=1)]] = Field(min_length=1)
    """Fractions of training, rising, in [0, 1]."""
    value: list[float] = Field(min_length=1)
    """Weights at those points; constant before the first and after the last."""

    @model_validator(mode="after")
    def _points_agree(self) -> "WeightSchedule":
        rising = all(a < b for a, b in zip(self.at, self.at[1:], strict=False))
        if len(self.at) != len(self.value) or not rising:
            message = "`at` must rise and have as many entries as `value`"
            raise ValueError(message)
        return self

    def weight(self, progress: float) -> float:
        points = list(zip(self.at, self.value, strict=True))
        if progress <= points[0][0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if progress <= x1:
                return y0 + (y1 - y0) * (progress - x0) / (x1 - x0)
        return points[-1][1]


class WeightedTerm(Config):
    """Base of every loss term: what it weighs in the total. Its numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)

    weight: float | WeightSchedule = 1.0
    """A number, or one that moves over training."""

    def weight_at(self, progress: float) -> float:
        if isinstance(self.weight, WeightSchedule):
            return self.weight.weight(progress)
        return self.weight

    @property
    def needs_teacher(self) -> bool:
        """Whether the run must have a `teacher` section."""
        return False

    @property
    def needs_labels(self) -> bool:
        """Whether the run must read labels: `data.stream.label_field`."""
        return False
