"""How the two modalities lie on the sphere.

Definitions are those of the papers named at each figure; everything is computed in float64 from
unit rows, row i of the images matching row i of the captions. A gap figure by itself predicts
nothing: read it beside recall and zero-shot accuracy.
"""

import math
from typing import Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.distributed import World
from vlm.errors import DataError
from vlm.evaluation.bootstrap import Scores
from vlm.evaluation.clustering import k_means, v_measure
from vlm.evaluation.exact import ROWS_AT_ONCE, UNIT, exact_mean, over_rows, whole_rows
from vlm.evaluation.ranks import top_matches
from vlm.evaluation.tasks.base import Context, Outcome, TaskConfig, TaskResult

__all__ = ["GeometryResult", "GeometryTask", "measure_geometry"]

_CLUSTERED_PAIRS: Final = 2000
Rows = Float[Tensor, "pair dim"]


class GeometryResult(TaskResult):
    """Figures of one set of pairs."""

    type: Literal["geometry"] = "geometry"
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
    image_uniformity_above_floor: float
    text_uniformity_above_floor: float
    image_effective_rank: float
    """exp of the entropy of singular values; d if no direction is wasted (arXiv:2210.02885)."""
    text_effective_rank: float
    image_w2_uniformity: float
    """Minus the Wasserstein distance to an even spread, at most 0 (arXiv:2403.00642)."""
    text_w2_uniformity: float
    hubness_skew: float
    """Skewness of how often an image is among a caption's 10 nearest; 0 if none is a hub."""
    tolerance: float | None
    """Mean cosine of different images of one group (arXiv:2012.09740); none without groups."""
    joint_v_measure: float | None
    """How well clusters of images and captions together are the groups, 0 to 1: k-means with as
    many clusters as groups over at most 2,000 pairs, as ModGap's code measures it
    (github.com/ispamm/ModGap); none without groups."""
    pairs: int


class GeometryTask(TaskConfig):
    """Measure where the modalities lie; of many captions of an image the first counts."""

    type: Literal["geometry"] = "geometry"
    group_field: str | None = None
    """Samples with equal values here are no strangers: their distances are left out of the
    relative gap and the cross-uniformity; none: every sample is its own group."""

    def measure(self, context: Context) -> Outcome[GeometryResult]:
        """Measure the pairs of the dataset.

        Raises:
            DataError: If there are fewer than 5 pairs, or all are of one group.
        """
        data = context.datasets[self.data]
        groups = None if self.group_field is None else data.groups(self.group_field)
        try:
            return measure_geometry(
                data.images,
                data.first_texts,
                torch.Generator().manual_seed(context.seed),
                groups=groups,
                data=self.data,
                world=context.world,
            )
        except ValueError as error:
            message = f"{data.source.location}: {error}"
            raise DataError(message) from error


def measure_geometry(
    images: Rows,
    texts: Rows,
    generator: torch.Generator,
    *,
    groups: Int64[Tensor, " pair"] | None = None,
    data: str = "",
    world: World | None = None,
) -> Outcome[GeometryResult]:
    """All figures of one set of pairs.

    Args:
        images: Unit rows.
        texts: Unit rows; row i matches row i of `images`.
        generator: Splits pairs for the separability.
        groups: Pairs with equal numbers show the same thing; by default every pair its own.
        data: Name of the dataset.
        world: The ranks that share what grows with the square of the pairs.

    Returns:
        The figures; there is no evidence.

    Raises:
        ValueError: If there are fewer than 5 pairs, or all are of one group.
    """
    if len(images) < 5:
        message = f"geometry needs at least 5 pairs, got {len(images)}"
        raise ValueError(message)
    world, own = world or World(), torch.arange(len(images))
    known = own if groups is None else groups
    if bool((known == known[0]).all()):
        message = f"geometry needs at least 2 groups, all {len(images)} pairs are of one"
        raise ValueError(message)
    # Unit rows of fp32 are unit to 1e-7 only, which the root below would blow up to 3e-4.
    image, text = F.normalize(images.double(), dim=1), F.normalize(texts.double(), dim=1)
    matched = (image * text).sum(dim=1)
    squared = (2 - 2 * matched).clamp(min=0)
    intra = 0.5 * (_mean_other_cosine(image, known) + _mean_other_cosine(text, known))
    matched_distance, intra_distance = (1 - exact_mean(matched)) / 2, (1 - float(intra)) / 2
    floor = -4 + 8 / image.shape[1]
    image_uniformity = _log_mean_potential(image, image, own, world)
    text_uniformity = _log_mean_potential(text, text, own, world)
    result = GeometryResult(
        data=data,
        centroid_gap=float((image.mean(dim=0) - text.mean(dim=0)).norm()),
        pair_distance=exact_mean(squared.sqrt()),
        linear_separability=_linear_separability(image, text, generator),
        relative_gap=matched_distance / max(matched_distance + intra_distance, 1e-12),
        alignment=exact_mean(squared),
        image_uniformity=image_uniformity,
        text_uniformity=text_uniformity,
        cross_uniformity=_log_mean_potential(image, text, known, world),
        uniformity_floor=floor,
        image_uniformity_above_floor=image_uniformity - floor,
        text_uniformity_above_floor=text_uniformity - floor,
        image_effective_rank=_effective_rank(image),
        text_effective_rank=_effective_rank(text),
        image_w2_uniformity=_w2_uniformity(image),
        text_w2_uniformity=_w2_uniformity(text),
        hubness_skew=_hubness_skew(text, image, world),
        tolerance=None if groups is None else _tolerance(image, groups),
        joint_v_measure=None
        if groups is None
        else _joint_v_measure(image, text, groups, generator),
        pairs=len(image),
    )
    scores = {
        "alignment": Scores(values=squared, clusters=known, higher_is_better=False),
        "pair_distance": Scores(values=squared.sqrt(), clusters=known, higher_is_better=False),
    }
    return Outcome(result=result, scores=scores)


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


def _log_mean_potential(
    left: Rows, right: Rows, groups: Int64[Tensor, " pair"], world: World
) -> float:
    """Log mean of exp(-2 |left_i - right_j|^2) over i, j of different groups, in tiles.

    The exponent is at least -8, so the sum itself can be taken.
    """

    def sums(start: int, stop: int) -> Float[Tensor, " chunk"]:
        rows, total = whole_rows(left[start:stop]), torch.zeros(stop - start, dtype=torch.float64)
        for begin in range(0, len(right), ROWS_AT_ONCE):
            tile = slice(begin, begin + ROWS_AT_ONCE)
            potentials = torch.exp(rows @ whole_rows(right[tile]).T * (4 / UNIT) - 4)
            potentials.masked_fill_(groups[start:stop, None] == groups[tile], 0)
            total += potentials.sum(dim=1)
        return total

    total = math.fsum(over_rows(len(left), world, sums).tolist())
    return math.log(total / _ordered_pairs(groups))


def _tolerance(rows: Rows, groups: Int64[Tensor, " pair"]) -> float | None:
    _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    pairs = int((counts * (counts - 1)).sum())
    if pairs == 0:
        return None
    sums = torch.zeros(len(counts), rows.shape[1], dtype=rows.dtype).index_add_(0, inverse, rows)
    return float((sums.square().sum() - rows.square().sum()) / pairs)


def _joint_v_measure(
    image: Rows, text: Rows, groups: Int64[Tensor, " pair"], generator: torch.Generator
) -> float:
    image, text, groups = (part[:_CLUSTERED_PAIRS] for part in (image, text, groups))
    clusters = k_means(torch.cat([image, text]), len(groups.unique()), generator)
    return v_measure(torch.cat([groups, groups]), clusters)


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


def _hubness_skew(queries: Rows, gallery: Rows, world: World) -> float:
    """Third standardised moment of the number of queries that have an item in their first 10."""
    nearest = top_matches(queries, gallery, 10, world).flatten()
    counts = torch.bincount(nearest, minlength=len(gallery)).double()
    centred = counts - counts.mean()
    deviation = centred.square().mean().sqrt()
    return float((centred**3).mean() / deviation**3) if float(deviation) > 0 else 0.0
