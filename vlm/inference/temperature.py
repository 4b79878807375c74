"""Making probabilities mean what they say: temperature, calibration error, a threshold for none.

Source: temperature scaling and the expected calibration error in 15 bins of Guo et al. 2017
(arXiv:1706.04599, sections 4.2 and 2); refusing by the largest probability, maximum concept
matching, of Ming et al. 2022 (arXiv:2211.13445).
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = [
    "TEMPERATURE_RANGE",
    "calibration_error",
    "fit_exclusive_temperature",
    "fit_independent_temperature",
    "fit_none_threshold",
]

TEMPERATURE_RANGE: Final = (0.05, 20.0)
"""A sample without a mistake would ask for temperature 0, so the fit ends here."""
_GOLDEN: Final = (math.sqrt(5) - 1) / 2
_STEPS: Final = 60
_BINS: Final = 15


def fit_exclusive_temperature(
    logits: Float[np.ndarray, "batch class"], targets: Int[np.ndarray, "batch"]
) -> float:
    """The temperature that gives the right classes the most likelihood under a softmax."""
    rows = np.arange(len(targets))

    def loss(inverse: float) -> float:
        scaled = inverse * logits.astype(np.float64)
        scaled -= scaled.max(axis=1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[rows, targets]).mean())

    return _best_temperature(loss)


def fit_independent_temperature(
    logits: Float[np.ndarray, "batch class"], holds: Bool[np.ndarray, "batch class"]
) -> float:
    """The temperature that gives what holds, and what does not, the most likelihood."""
    signs = np.where(holds, -1.0, 1.0)

    def loss(inverse: float) -> float:
        return float(np.logaddexp(0, inverse * signs * logits.astype(np.float64)).mean())

    return _best_temperature(loss)


def calibration_error(
    confidence: Float[np.ndarray, "batch"], correct: Bool[np.ndarray, "batch"]
) -> float:
    """How far confidence is from accuracy, 0 to 1, averaged over 15 bins of equal width."""
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def fit_none_threshold(
    known: Float[np.ndarray, "batch"], none: Float[np.ndarray, "none_batch"]
) -> float:
    """The largest probability under which "none of these" is the better answer.

    It maximises the mean of two fractions: known samples kept, and others refused. Where several
    do, it is the lowest.

    Args:
        known: Largest probability of each sample that shows one of the classes, at least one.
        none: Of each that shows none of them, at least one.
    """
    values = np.unique(np.concatenate([known, none]))
    candidates = np.concatenate([[0.0], (values[1:] + values[:-1]) / 2])
    scores = [(known >= c).mean() + (none < c).mean() for c in candidates]
    return float(candidates[int(np.argmax(scores))])


def _best_temperature(loss: Callable[[float], float]) -> float:
    """Golden section over the logarithm; both losses are convex in 1 / temperature."""
    low, high = (math.log(1 / t) for t in reversed(TEMPERATURE_RANGE))
    for _ in range(_STEPS):
        width = _GOLDEN * (high - low)
        if loss(math.exp(high - width)) <= loss(math.exp(low + width)):
            high = low + width
        else:
            low = high - width
    return math.exp(-(low + high) / 2)
