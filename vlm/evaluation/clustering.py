"""k-means and the V-measure: do both modalities fall into the same clusters?"""

from typing import Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["k_means", "v_measure"]

_STEPS: Final = 50

Rows = Float[Tensor, "row dim"]
Labels = Int64[Tensor, " row"]


def k_means(rows: Rows, k: int, generator: torch.Generator) -> Labels:
    """Clusters of float64 rows by Lloyd's algorithm.

    Starts are drawn by k-means++ (Arthur & Vassilvitskii 2007). A cluster that loses all its rows
    keeps its centre.

    Raises:
        ValueError: If there are fewer rows than clusters.
    """
    if len(rows) < k:
        message = f"{k} clusters need as many rows, got {len(rows)}"
        raise ValueError(message)
    centres = _starts(rows, k, generator)
    labels = _nearest(rows, centres)
    for _ in range(_STEPS):
        sums = torch.zeros_like(centres).index_add_(0, labels, rows)
        counts = torch.bincount(labels, minlength=k)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        moved = _nearest(rows, centres)
        if moved.equal(labels):
            break
        labels = moved
    return labels


def v_measure(classes: Labels, clusters: Labels) -> float:
    """Harmonic mean of homogeneity and completeness, 0 to 1.

    Source: Rosenberg & Hirschberg 2007, with beta 1.
    """
    _, left = torch.unique(classes, return_inverse=True)
    _, right = torch.unique(clusters, return_inverse=True)
    pairs = left * (int(right.max()) + 1) + right
    joint, of_classes, of_clusters = (_entropy(x) for x in (pairs, left, right))
    homogeneity = 1 - (joint - of_clusters) / of_classes if of_classes > 0 else 1.0
    completeness = 1 - (joint - of_classes) / of_clusters if of_clusters > 0 else 1.0
    total = homogeneity + completeness
    return 2 * homogeneity * completeness / total if total > 0 else 0.0


def _entropy(labels: Labels) -> float:
    _, counts = torch.unique(labels, return_counts=True)
    return float(torch.special.entr(counts.double() / len(labels)).sum())


def _starts(rows: Rows, k: int, generator: torch.Generator) -> Float[Tensor, "cluster dim"]:
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    distances = (rows - rows[chosen[0]]).square().sum(dim=1)
    while len(chosen) < k:
        # Rows that coincide with starts have no weight; where all do, any will serve.
        weights = distances if float(distances.sum()) > 0 else torch.ones_like(distances)
        edges = weights.cumsum(dim=0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * edges[-1]
        row = min(int(torch.searchsorted(edges, draw, right=True)), len(rows) - 1)
        chosen.append(row)
        distances = torch.minimum(distances, (rows - rows[row]).square().sum(dim=1))
    return rows[chosen].clone()


def _nearest(rows: Rows, centres: Float[Tensor, "cluster dim"]) -> Labels:
    return (2 * rows @ centres.T - centres.square().sum(dim=1)).argmax(dim=1)
