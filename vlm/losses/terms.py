"""Loss terms as configuration: each names its function, its weight and what it reports."""

import itertools
from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from vlm.config import Config
from vlm.losses.contrastive import SameGroup, clip_loss, same_group_mask
from vlm.losses.gap import alignment, centroid_uniformity, cross_uniformity, uniformity
from vlm.losses.sigmoid import siglip_loss
from vlm.types import Features, LossOutput

__all__ = [
    "AlignmentTerm",
    "CentroidUniformityTerm",
    "ClipTerm",
    "CrossUniformityTerm",
    "LossTerm",
    "SiglipTerm",
    "UniformityTerm",
    "WeightSchedule",
    "total_loss",
]

Statistics = dict[str, Float[Tensor, ""]]


class WeightSchedule(Config):
    """A weight that moves linearly between points of training."""

    at: list[float] = Field(min_length=1)
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


class _Term(Config):
    weight: float | WeightSchedule = 1.0

    def weight_at(self, progress: float) -> float:
        if isinstance(self.weight, WeightSchedule):
            return self.weight.weight(progress)
        return self.weight


class Term(Protocol):
    """What `total_loss` asks of a term."""

    @property
    def type(self) -> str: ...

    def weight_at(self, progress: float) -> float: ...

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]: ...


class ClipTerm(_Term):
    """Symmetric InfoNCE; see `clip_loss`."""

    type: Literal["clip"] = "clip"
    same_group: SameGroup = "positive"
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        value = clip_loss(
            features.image,
            features.text,
            features.logit_scale,
            group_ids=features.group_ids,
            same_group=self.same_group,
            label_smoothing=self.label_smoothing,
        )
        return value, _contrastive_statistics(features)


class SiglipTerm(_Term):
    """Pairwise sigmoid loss; see `siglip_loss`."""

    type: Literal["siglip"] = "siglip"
    same_group: SameGroup = "positive"

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        if features.logit_bias is None:
            message = "the sigmoid loss needs a logit bias, and the model has none"
            raise ValueError(message)
        value = siglip_loss(
            features.image,
            features.text,
            features.logit_scale,
            features.logit_bias,
            group_ids=features.group_ids,
            same_group=self.same_group,
        )
        return value, _contrastive_statistics(features)


class AlignmentTerm(_Term):
    """Mean squared distance of pairs; see `alignment`."""

    type: Literal["alignment"] = "alignment"

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        return alignment(features.image, features.text), {}


class UniformityTerm(_Term):
    """Mean uniformity of the two modalities; see `uniformity`."""

    type: Literal["uniformity"] = "uniformity"
    t: float = Field(2.0, gt=0)

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        image = uniformity(features.image, t=self.t, group_ids=features.group_ids)
        text = uniformity(features.text, t=self.t, group_ids=features.group_ids)
        # What even points on this sphere have, to second order: -2t + 2t^2/d (-4 + 8/d at t = 2).
        floor = -2 * self.t + 2 * self.t**2 / features.image.shape[1]
        statistics = {"image_above_floor": image - floor, "text_above_floor": text - floor}
        return 0.5 * (image + text), statistics


class CrossUniformityTerm(_Term):
    """Uniformity between the modalities; see `cross_uniformity`."""

    type: Literal["cross_uniformity"] = "cross_uniformity"
    t: float = Field(2.0, gt=0)

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        value = cross_uniformity(
            features.image, features.text, t=self.t, group_ids=features.group_ids
        )
        return value, {}


class CentroidUniformityTerm(_Term):
    """Uniformity of the midpoints of pairs; see `centroid_uniformity`."""

    type: Literal["centroid_uniformity"] = "centroid_uniformity"
    t: float = Field(2.0, gt=0)

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        value = centroid_uniformity(
            features.image, features.text, t=self.t, group_ids=features.group_ids
        )
        return value, {}


LossTerm = Annotated[
    ClipTerm
    | SiglipTerm
    | AlignmentTerm
    | UniformityTerm
    | CrossUniformityTerm
    | CentroidUniformityTerm,
    Field(discriminator="type"),
]


def total_loss(terms: Sequence[Term], features: Features, *, progress: float) -> LossOutput:
    """Sum of weight times term over the global batch.

    Args:
        terms: At least one.
        features: The gathered global batch, float32.
        progress: Fraction of training done, in [0, 1].

    Returns:
        The total, and detached statistics: each term's own value under its type, and what it
        reports under `type/name`.
    """
    total = features.image.new_zeros(())
    statistics: Statistics = {}
    for term in terms:
        value, extra = term.compute(features)
        total = total + term.weight_at(progress) * value
        statistics[term.type] = value.detach()
        statistics.update({f"{term.type}/{name}": v.detach() for name, v in extra.items()})
    return LossOutput(total=total, statistics=statistics)


@torch.no_grad()
def _contrastive_statistics(features: Features) -> Statistics:
    """Temperature, similarities, and how many negatives really push (arXiv:2012.09740).

    `negative_entropy` is the entropy of the softmax over the negatives of an image divided by its
    largest value: 1 means that all push alike, 0 that a single one does.
    """
    cosines = features.image @ features.text.T
    same = same_group_mask(features.group_ids)
    negatives = ~same
    num_rows = len(cosines)
    masked = (same.sum() - num_rows) / max(num_rows * (num_rows - 1), 1)
    statistics = {
        "temperature": 1 / features.logit_scale[0],
        "positive_similarity": cosines.diagonal().mean(),
        "same_group_fraction": masked,
    }
    counts = negatives.sum(dim=1)
    if bool((counts >= 2).all()):
        logits = (features.logit_scale * cosines).masked_fill(same, -torch.inf)
        shares = logits.softmax(dim=1)
        entropy = torch.special.entr(shares).sum(dim=1) / counts.log()
        statistics["negative_similarity"] = cosines[negatives].mean()
        statistics["negative_entropy"] = entropy.mean().clamp(0.0, 1.0)
    return statistics
