"""How the two modalities lie on the sphere.

Definitions are those of the papers named at each figure; everything is computed in float64 from
unit rows, row i of the images matching row i of the captions. A gap figure by itself predicts
nothing: read it beside recall and zero-shot accuracy.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.config import Config

__all__ = ["Geometry", "measure_geometry"]

_TILE = 2048
Rows = Float[Tensor, "pair dim"]


class Geometry(Config):
    """Figures of one set of pairs."""

    centroid_gap: float
    """Distance between the mean image and the mean caption, 0 to 2 (arXiv:2203.02053)."""
    pair_distance: float
    """Mean distance of matching rows, 0 to 2."""
    linear_separability: float
    """Held-out accuracy of telling images from captions, split by pair; 0.5 means no gap."""
    relative_gap: float
    """Mean matched distance m over m + mean intra-modal distance, 0 to 1 (arXiv:2404.07983).

    Rows of one group are left out of the intra-modal mean, as the paper's definition asks.
    """
    alignment: float
    """Mean squared distance of matching rows, 0 to 4 (arXiv:2005.10242)."""
    image_uniformity: float
    """Log mean Gaussian potential; lower is more spread (arXiv:2005.10242)."""
    text_uniformity: float
    cross_uniformity: float
    """The same between images and captions of different groups (arXiv:2405.18570)."""
    uniformity_floor: float
    """What evenly spread points of this dimension have, -4 + 8/d."""
    image_effective_rank: float
    """exp of the entropy of singular values; d if no direction is wasted (arXiv:2210.02885)."""
    text_effective_rank: float
    image_w2_uniformity: float
    """Minus the Wasserstein distance to an even spread, at most 0 (arXiv:2403.00642)."""
    text_w2_uniformity: float
    hubness_skew: float
    """Skewness of how often an image is among a caption's 10 nearest; 0 if none is a hub."""
    pairs: int


def measure_geometry(
    images: Rows,
    texts: Rows,
    generator: torch.Generator,
    *,
    groups: Int64[Tensor, " pair"] | None = None,
) -> Geometry:
    """All figures of one set of pairs.

    Args:
        images: Unit rows.
        texts: Unit rows; row i matches row i of `images`.
        generator: Splits pairs for the separability.
        groups: Pairs with equal numbers show the same thing; by default every pair its own.

    Raises:
        ValueError: If there are fewer than 5 pairs, or all are of one group.
    """
    if len(images) < 5:
        message = f"geometry needs at least 5 pairs, got {len(images)}"
        raise ValueError(message)
    own = torch.arange(len(images))
    groups = own if groups is None else groups
    if bool((groups == groups[0]).all()):
        message = f"geometry needs at least 2 groups, all {len(images)} pairs are of one"
        raise ValueError(message)
    # Unit rows of fp32 are unit to 1e-7 only, which the root below would blow up to 3e-4.
    image, text = F.normalize(images.double(), dim=1), F.normalize(texts.double(), dim=1)
    matched = (image * text).sum(dim=1)
    squared = (2 - 2 * matched).clamp(min=0)
    intra = 0.5 * (_mean_other_cosine(image, groups) + _mean_other_cosine(text, groups))
    matched_distance, intra_distance = (1 - matched.mean()) / 2, (1 - intra) / 2
    return Geometry(
        centroid_gap=float((image.mean(dim=0) - text.mean(dim=0)).norm()),
        pair_distance=float(squared.sqrt().mean()),
        linear_separability=_linear_separability(image, text, generator),
        relative_gap=float(matched_distance / (matched_distance + intra_distance).clamp(min=1e-12)),
        alignment=float(squared.mean()),
        image_uniformity=_log_mean_potential(image, image, own),
        text_uniformity=_log_mean_potential(text, text, own),
        cross_uniformity=_log_mean_potential(image, text, groups),
        uniformity_floor=-4 + 8 / image.shape[1],
        image_effective_rank=_effective_rank(image),
        text_effective_rank=_effective_rank(text),
        image_w2_uniformity=_w2_uniformity(image),
        text_w2_uniformity=_w2_uniformity(text),
        hubness_skew=_hubness_skew(text, image),
        pairs=len(image),
    )


def _mean_other_cosine(rows: Rows, groups: Int64[Tensor, " pair"]) -> Tensor:
    """Mean cosine of rows of different groups, without a matrix of pairs.

    |sum z|^2 is the sum over all ordered pairs, and so it is within each group.
    """
    _, inverse = torch.unique(groups, return_inverse=True)
    sums = torch.zeros(int(inverse.max()) + 1, rows.shape[1], dtype=rows.dtype)
    sums.index_add_(0, inverse, rows)
    total = rows.sum(dim=0).square().sum() - sums.square().sum()
    return total / _ordered_pairs(groups)


def _ordered_pairs(groups: Int64[Tensor, " pair"]) -> int:
    """How many ordered pairs there are of rows of different groups."""
    _, sizes = torch.unique(groups, return_counts=True)
    return len(groups) ** 2 - int(sizes.square().sum())


def _log_mean_potential(left: Rows, right: Rows, groups: Int64[Tensor, " pair"]) -> float:
    """Log mean of exp(-2 |left_i - right_j|^2) over i, j of different groups, in tiles of rows."""
    sums = []
    for start in range(0, len(left), _TILE):
        potentials = 4 * (left[start : start + _TILE] @ right.T) - 4
        potentials.masked_fill_(groups[start : start + _TILE, None] == groups, -torch.inf)
        sums.append(torch.logsumexp(potentials.flatten(), dim=0))
    total = torch.logsumexp(torch.stack(sums), dim=0)
    return float(total) - math.log(_ordered_pairs(groups))


def _linear_separability(image: Rows, text: Rows, generator: torch.Generator) -> float:
    """Accuracy of logistic regression on the fifth of the pairs that it was not fitted on."""
    order = torch.randperm(len(image), generator=generator)
    held_out, fitted = order[: max(1, len(order) // 5)], order[max(1, len(order) // 5) :]
    rows = torch.cat([image[fitted], text[fitted]])
    labels = torch.cat([torch.ones(len(fitted)), torch.zeros(len(fitted))]).double()
    weight = torch.zeros(image.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = rows @ weight[:-1] + weight[-1]
        penalty = 0.5 * weight[:-1].square().sum() / len(rows)  # scikit-learn's C = 1
        value = F.binary_cross_entropy_with_logits(logits, labels) + penalty
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        correct_image = (image[held_out] @ weight[:-1] + weight[-1]) > 0
        correct_text = (text[held_out] @ weight[:-1] + weight[-1]) <= 0
        return float(torch.cat([correct_image, correct_text]).double().mean())


def _effective_rank(rows: Rows) -> float:
    values = torch.linalg.svdvals(rows)
    shares = values / values.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def _w2_uniformity(rows: Rows) -> float:
    mean = rows.mean(dim=0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    roots = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt().sum()
    dim = rows.shape[1]
    squared = mean.square().sum() + 1 + covariance.trace() - 2 / math.sqrt(dim) * roots
    return -math.sqrt(max(float(squared), 0.0))


def _hubness_skew(queries: Rows, gallery: Rows) -> float:
    """Third standardised moment of the number of queries that have an item in their first 10."""
    counts = torch.zeros(len(gallery), dtype=torch.float64)
    k = min(10, len(gallery))
    for start in range(0, len(queries), _TILE):
        nearest = (queries[start : start + _TILE] @ gallery.T).topk(k, dim=1).indices.flatten()
        counts += torch.bincount(nearest, minlength=len(gallery))
    centred = counts - counts.mean()
    deviation = centred.square().mean().sqrt()
    return float((centred**3).mean() / deviation**3) if float(deviation) > 0 else 0.0
