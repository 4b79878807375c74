"""How sure a figure is, and whether two models differ: the percentile bootstrap.

What is drawn again is not the single query but the cluster that it belongs to, e.g. all captions of
an image, since those are right or wrong together (Davison & Hinkley 1997, section 3.8; percentile
intervals: Efron & Tibshirani 1993, chapter 13).
"""

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.evaluation.exact import exact_mean

__all__ = ["BootstrapConfig", "Difference", "Interval", "Scores", "differences", "intervals"]

_NUMBERS_AT_ONCE = 4_000_000
Verdict = Literal["better", "worse", "no difference shown"]


class BootstrapConfig(Config):
    """How intervals are drawn."""

    draws: int = Field(1000, ge=100)
    level: float = Field(0.95, gt=0.5, lt=1)
    """Share of draws inside an interval."""


class Interval(Config):
    """Where a figure lies with the sureness of `BootstrapConfig.level`."""

    low: float
    high: float


class Difference(Config):
    """One figure of two models on the same queries."""

    value: float
    """Of the first model."""
    against: float
    """Of the second."""
    difference: Interval
    """Of first minus second; drawn for both models alike."""
    verdict: Verdict
    """Of the first: better or worse only if the interval leaves out 0."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a figure is the mean of."""

    values: Float[Tensor, " query"]
    clusters: Int64[Tensor, " query"]
    """Queries with equal numbers are drawn together."""
    higher_is_better: bool = True


def intervals(
    scores: dict[str, Scores], config: BootstrapConfig, *, seed: int
) -> dict[str, Interval]:
    """The interval of the mean of each figure's scores."""
    return {
        name: _interval(_draws(found, name, config, seed), config) for name, found in scores.items()
    }


def differences(
    first: dict[str, Scores], second: dict[str, Scores], config: BootstrapConfig, *, seed: int
) -> dict[str, Difference]:
    """First against second model, figure by figure; the same queries are drawn for both.

    Raises:
        ValueError: If the scores are not of the same queries.
    """
    found = {}
    for name, ours in first.items():
        theirs = second.get(name)
        if theirs is None or not ours.clusters.equal(theirs.clusters):
            message = f"{name}: the two models were not asked the same queries"
            raise ValueError(message)
        paired = Scores(values=ours.values - theirs.values, clusters=ours.clusters)
        interval = _interval(_draws(paired, name, config, seed), config)
        found[name] = Difference(
            value=exact_mean(ours.values),
            against=exact_mean(theirs.values),
            difference=interval,
            verdict=_verdict(interval, higher_is_better=ours.higher_is_better),
        )
    return found


def _verdict(interval: Interval, *, higher_is_better: bool) -> Verdict:
    if interval.low > 0:
        return "better" if higher_is_better else "worse"
    if interval.high < 0:
        return "worse" if higher_is_better else "better"
    return "no difference shown"


def _interval(draws: Float[np.ndarray, " draw"], config: BootstrapConfig) -> Interval:
    tail = (1 - config.level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail]).tolist()
    return Interval(low=low, high=high)


def _draws(
    scores: Scores, name: str, config: BootstrapConfig, seed: int
) -> Float[np.ndarray, " draw"]:
    """The mean of each draw of as many clusters as there are, with replacement."""
    values = scores.values.double().numpy()
    _, which = np.unique(scores.clusters.numpy(), return_inverse=True)
    sums = np.bincount(which, weights=values)
    counts = np.bincount(which).astype(np.float64)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    at_once = max(1, _NUMBERS_AT_ONCE // len(sums))
    means = []
    for start in range(0, config.draws, at_once):
        size = (min(at_once, config.draws - start), len(sums))
        chosen = generator.integers(0, len(sums), size=size)
        means.append(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    return np.concatenate(means)
