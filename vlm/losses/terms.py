"""Loss terms as configuration: each names its function, its weight and what it reports."""

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.losses.caption import CaptionTerm
from vlm.losses.contrastive import SameGroup, clip_loss
from vlm.losses.decoupled import dcl_loss
from vlm.losses.gap import alignment, centroid_uniformity, cross_uniformity, uniformity
from vlm.losses.sigmoid import siglip_loss
from vlm.losses.statistics import Statistics, contrastive_statistics
from vlm.losses.weights import WeightedTerm
from vlm.types import Features, LossOutput

__all__ = [
    "AlignmentTerm",
    "CaptionTerm",
    "CentroidUniformityTerm",
    "ClipTerm",
    "CrossUniformityTerm",
    "DclTerm",
    "LossTerm",
    "SiglipTerm",
    "Term",
    "UniformityTerm",
    "total_loss",
]


@runtime_checkable
class Term(Protocol):
    """What `total_loss` asks of a term."""

    @property
    def type(self) -> str: ...

    def weight_at(self, progress: float) -> float: ...

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]: ...


class ClipTerm(WeightedTerm):
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
        return value, contrastive_statistics(features)


class SiglipTerm(WeightedTerm):
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
        return value, contrastive_statistics(features)


class DclTerm(WeightedTerm):
    """Decoupled contrastive loss; see `dcl_loss`."""

    type: Literal["dcl"] = "dcl"
    same_group: SameGroup = "positive"
    weight_sigma: float | None = Field(None, gt=0)
    """Sharpness of DCLW's weights, 0.5 in the paper; none is plain DCL."""

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        value = dcl_loss(
            features.image,
            features.text,
            features.logit_scale,
            group_ids=features.group_ids,
            same_group=self.same_group,
            weight_sigma=self.weight_sigma,
        )
        return value, contrastive_statistics(features)


class AlignmentTerm(WeightedTerm):
    """Mean squared distance of pairs; see `alignment`."""

    type: Literal["alignment"] = "alignment"

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        return alignment(features.image, features.text), {}


class UniformityTerm(WeightedTerm):
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


class CrossUniformityTerm(WeightedTerm):
    """Uniformity between the modalities; see `cross_uniformity`."""

    type: Literal["cross_uniformity"] = "cross_uniformity"
    t: float = Field(2.0, gt=0)

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        value = cross_uniformity(
            features.image, features.text, t=self.t, group_ids=features.group_ids
        )
        return value, {}


class CentroidUniformityTerm(WeightedTerm):
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
    | DclTerm
    | AlignmentTerm
    | UniformityTerm
    | CrossUniformityTerm
    | CentroidUniformityTerm
    | CaptionTerm,
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
