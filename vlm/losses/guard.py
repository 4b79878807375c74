"""A limit to the weight of a term that closes the gap: once it is closed, or retrieval suffers."""

from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.losses.statistics import Statistics
from vlm.types import Features

__all__ = ["GapGuard", "held_weight", "squared_centroid_gap"]

RunValues = dict[str, Float[Tensor, ""]]


class GapGuard(Config):
    """From the first step whose average gap is under the floor, the weight rises no more.

    With `recall_drop`, nor from the first evaluation on that finds less than before.
    """

    gap_floor: float = Field(0.05, gt=0, lt=2)
    """Distance of the centroids of the two modalities."""
    steps: int = Field(100, ge=1)
    """Steps over which the squared gap is averaged, since one batch is noisy."""
    recall_drop: float | None = Field(None, gt=0, lt=1)
    """So much under its best, the held-out R@1 holds the weight as well; 0.005 is half a point.
    The run must have an `evaluation` with a task of type retrieval."""


@torch.no_grad()
def squared_centroid_gap(features: Features) -> Float[Tensor, ""]:
    """Squared distance of the centroids of the population that the batch was drawn from.

    Without bias, hence below 0 at times: the centroids of b samples lie apart by about 1 / b of
    their mean squared distance even where those of all samples coincide, and that is taken off.
    """
    apart = features.image - features.text
    num_rows = max(len(apart), 2)
    return (apart.sum(dim=0).square().sum() - apart.square().sum()) / (num_rows * (num_rows - 1))


@torch.no_grad()
def held_weight(
    term: Any, features: Features, before: RunValues, progress: float
) -> tuple[float | Float[Tensor, ""], Statistics, RunValues]:
    """The term's weight at this step, what to report of it, and what to remember.

    A term without a guard has its scheduled weight, and nothing to report or remember.
    """
    scheduled: float = term.weight_at(progress)
    guard: GapGuard | None = getattr(term, "guard", None)
    if guard is None:
        return scheduled, {}, {}
    names = [f"{term.type}/{name}" for name in ("weight_limit", "squared_gap")]
    gap = squared_centroid_gap(features)
    limit = before.get(names[0], torch.full_like(gap, torch.inf))
    average = torch.lerp(before.get(names[1], gap), gap, 1 / guard.steps)
    weight = limit.clamp(max=scheduled)
    closed = average < guard.gap_floor**2
    limit = torch.where(closed, torch.minimum(limit, weight), limit)
    return weight, {"weight": weight}, {names[0]: limit, names[1]: average}
