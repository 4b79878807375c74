"""From candidates to what is shown: pure functions of unit rows and scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from serving.stores import Hit, Modality, best_first
from vlm.inference import HUB_SHARPNESS, crowding

__all__ = [
    "QueryBank",
    "Ranked",
    "centred",
    "combined",
    "diversified",
    "fused",
    "grouped",
    "percentiles",
    "rescored",
    "without_hubs",
]

_RRF: Final = 60
"""k of reciprocal rank fusion, as in the paper."""
_SMALL: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A hit with what was found out about it."""

    hit: Hit
    calibrated: float | None = None
    """0 to 1."""
    duplicates: tuple[str, ...] = field(default=())
    """Ids of worse hits that are nearly the same."""


@dataclass(frozen=True, kw_only=True)
class QueryBank:
    """Queries as people ask them, to tell hubs by: items that are near to everything."""

    rows: np.ndarray
    """Unit rows, float32 [query dim]."""
    best: frozenset[str]
    """Ids of the items that are the best hit of one of them."""


def centred(rows: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    """Unit rows without the mean of their modality; as they are where there is none.

    Source: I0T-post, section G5 of the method sheet; GR-CLIP (arXiv:2507.19054) for the use.
    """
    if mean is None:
        return rows
    moved = rows - mean
    norms = np.linalg.norm(moved, axis=-1, keepdims=True)
    return (moved / np.maximum(norms, _SMALL)).astype(np.float32)


def combined(rows: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray | None:
    """The direction of a weighted sum of unit rows; None if the parts cancel out.

    Source: the query of SIMAT, norm(I + lambda (T_target - T_source)) (arXiv:2112.03162).
    """
    total = np.einsum("p,pd->d", np.asarray(weights, np.float64), np.stack(rows))
    norm = float(np.linalg.norm(total))
    return None if norm < _SMALL else (total / norm).astype(np.float32)


def rescored(
    query: np.ndarray, hits: Sequence[Hit], means: Mapping[Modality, np.ndarray]
) -> list[Hit]:
    """Hits by their centred cosine with a centred query, best first."""
    if not hits:
        return []
    rows = np.stack([centred(_row(hit), means.get(hit.modality)) for hit in hits])
    return _with_scores(hits, rows @ query)


def without_hubs(hits: Sequence[Hit], bank: QueryBank) -> list[Hit]:
    """QB-Norm with its dynamic inverted softmax: items near to every query count less.

    Nothing changes unless the best hit is the best of some query of the bank. Scores stay the
    cosines they were; only the order changes.

    Source: Bogolin et al. 2022 (arXiv:2112.12777), with an inverse temperature of 20.
    """
    if not hits or hits[0].id not in bank.best:
        return list(hits)
    rows = np.stack([_row(hit) for hit in hits])
    scores = np.array([hit.score for hit in hits])
    normalised = HUB_SHARPNESS * scores - crowding(rows, bank.rows)
    order = sorted(range(len(hits)), key=lambda n: (-normalised[n], hits[n].id))
    return [hits[n] for n in order]


def fused(*rankings: Sequence[Hit]) -> list[Hit]:
    """One ranking of several, by the sum of 1 / (60 + rank); that sum is the score.

    Source: reciprocal rank fusion, Cormack et al. 2009.
    """
    scores: dict[str, float] = {}
    known: dict[str, Hit] = {}
    for hits in rankings:
        for rank, hit in enumerate(hits, start=1):
            scores[hit.id] = scores.get(hit.id, 0.0) + 1 / (_RRF + rank)
            known.setdefault(hit.id, hit)
    merged = [replace(known[item_id], score=round(s, 6)) for item_id, s in scores.items()]
    return sorted(merged, key=best_first)


def diversified(hits: Sequence[Hit], limit: int, diversity: float) -> list[Hit]:
    """Maximal marginal relevance: each next hit is near the query and far from those before it.

    Args:
        hits: Best first, with vectors.
        limit: Most hits.
        diversity: 0 changes nothing, 1 looks only at what was not shown yet.

    Source: Carbonell and Goldstein 1998, with lambda = 1 - diversity.
    """
    rows = np.stack([_row(hit) for hit in hits]) if hits else np.empty((0, 1))
    scores = np.array([hit.score for hit in hits])
    nearest = np.full(len(hits), -1.0)
    left = list(range(len(hits)))
    chosen: list[int] = []
    while left and len(chosen) < limit:
        value = (1 - diversity) * scores[left] - diversity * nearest[left]
        best = left.pop(int(np.argmax(value)) if chosen else 0)
        chosen.append(best)
        nearest = np.maximum(nearest, rows @ rows[best])
    return [hits[n] for n in chosen]


def grouped(hits: Sequence[Hit], limit: int, similarity: float) -> list[Ranked]:
    """Hits that are nearly the same as a better one are folded into it.

    Args:
        hits: Best first, with vectors.
        limit: Most groups.
        similarity: Cosine from which two are nearly the same.
    """
    leaders: list[Hit] = []
    folded: list[list[str]] = []
    for hit in hits:
        row = _row(hit)
        near = [n for n, leader in enumerate(leaders) if float(_row(leader) @ row) >= similarity]
        if near:
            folded[near[0]].append(hit.id)
        elif len(leaders) < limit:
            leaders.append(hit)
            folded.append([])
    return [
        Ranked(hit=hit, duplicates=tuple(ids)) for hit, ids in zip(leaders, folded, strict=True)
    ]


def percentiles(scores: Sequence[float], reference: np.ndarray) -> list[float]:
    """Of each score the share of reference scores that are lower, 0 to 1."""
    ordered = np.sort(reference)
    return [float(np.searchsorted(ordered, s) / max(1, len(ordered))) for s in scores]


def _with_scores(hits: Sequence[Hit], scores: np.ndarray) -> list[Hit]:
    found = [
        replace(hit, score=round(float(s), 6))
        for hit, s in zip(hits, scores, strict=True)
        if math.isfinite(s)
    ]
    return sorted(found, key=best_first)


def _row(hit: Hit) -> np.ndarray:
    assert hit.vector is not None, "this needs hits with vectors"
    return hit.vector
