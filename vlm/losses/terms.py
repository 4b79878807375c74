"""Loss terms as configuration: each names its function, its weight and what it reports."""

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from vlm.losses.caption import CaptionTerm
from vlm.losses.compositional_terms import FastclipV3Term, IsogclrTerm, SogclrTerm
from vlm.losses.consistency import cyclic_consistency
from vlm.losses.contrastive import clip_loss
from vlm.losses.contrastive_term import ContrastiveTerm
from vlm.losses.decoupled import dcl_loss
from vlm.losses.gap_terms import (
    AlignmentTerm,
    CentroidUniformityTerm,
    CrossUniformityTerm,
    UniformityTerm,
)
from vlm.losses.guard import held_weight
from vlm.losses.memory import Remembered, RemembersSamples, initial_values
from vlm.losses.sigmoid import siglip_loss
from vlm.losses.soft_terms import DistillationTerm, SoftClipTerm
from vlm.losses.statistics import Statistics, contrastive_statistics
from vlm.losses.weights import WeightedTerm
from vlm.types import Features, LossOutput, Memory

__all__ = [
    "AlignmentTerm",
    "CaptionTerm",
    "CentroidUniformityTerm",
    "ClipTerm",
    "CrossUniformityTerm",
    "CyclipTerm",
    "DclTerm",
    "DistillationTerm",
    "FastclipV3Term",
    "IsogclrTerm",
    "LossTerm",
    "SiglipTerm",
    "SoftClipTerm",
    "SogclrTerm",
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


class ClipTerm(ContrastiveTerm):
    """Symmetric InfoNCE; see `clip_loss`."""

    type: Literal["clip"] = "clip"
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _smoothing_has_no_mask(self) -> "ClipTerm":
        if self.label_smoothing and self.false_negatives is not None:
            message = "label_smoothing and false_negatives exclude each other: leave one out"
            raise ValueError(message)
        return self

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        similar = self.similar(features)
        value = clip_loss(
            features.image,
            features.text,
            features.logit_scale,
            group_ids=features.group_ids,
            same_group=self.same_group,
            similar=similar,
            label_smoothing=self.label_smoothing,
            share=features.share,
        )
        return value, contrastive_statistics(features, similar)


class SiglipTerm(ContrastiveTerm):
    """Pairwise sigmoid loss; see `siglip_loss`."""

    type: Literal["siglip"] = "siglip"

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        if features.logit_bias is None:
            message = "the sigmoid loss needs a logit bias, and the model has none"
            raise ValueError(message)
        similar = self.similar(features)
        value = siglip_loss(
            features.image,
            features.text,
            features.logit_scale,
            features.logit_bias,
            group_ids=features.group_ids,
            same_group=self.same_group,
            similar=similar,
            share=features.share,
        )
        return value, contrastive_statistics(features, similar)


class DclTerm(ContrastiveTerm):
    """Decoupled contrastive loss; see `dcl_loss`."""

    type: Literal["dcl"] = "dcl"
    weight_sigma: float | None = Field(None, gt=0)
    """Sharpness of DCLW's weights, 0.5 in the paper; none is plain DCL."""

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        similar = self.similar(features)
        value = dcl_loss(
            features.image,
            features.text,
            features.logit_scale,
            group_ids=features.group_ids,
            same_group=self.same_group,
            similar=similar,
            weight_sigma=self.weight_sigma,
            share=features.share,
        )
        return value, contrastive_statistics(features, similar)


class CyclipTerm(WeightedTerm):
    """Consistency of distances within and between the modalities; see `cyclic_consistency`."""

    type: Literal["cyclip"] = "cyclip"
    in_modal: float = Field(0.25, ge=0)
    cross_modal: float = Field(0.25, ge=0)

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        in_modal, cross_modal = cyclic_consistency(
            features.image, features.text, share=features.share
        )
        value = self.in_modal * in_modal + self.cross_modal * cross_modal
        return value, {"in_modal": in_modal, "cross_modal": cross_modal}


LossTerm = Annotated[
    ClipTerm
    | SiglipTerm
    | DclTerm
    | AlignmentTerm
    | UniformityTerm
    | CrossUniformityTerm
    | CentroidUniformityTerm
    | CyclipTerm
    | SoftClipTerm
    | DistillationTerm
    | SogclrTerm
    | IsogclrTerm
    | FastclipV3Term
    | CaptionTerm,
    Field(discriminator="type"),
]


def total_loss(
    terms: Sequence[Term], features: Features, *, progress: float, memory: Memory | None = None
) -> LossOutput:
    """Sum of weight times term over the global batch.

    Args:
        terms: At least one.
        features: The gathered global batch, float32.
        progress: Fraction of training done, in [0, 1].
        memory: What terms remember of these samples and of the run; as at the start if none.

    Returns:
        The total, what is remembered after it, and detached statistics: each term's own value under
        its type, and what it reports under `type/name`.
    """
    before = memory or Memory()
    after = Memory()
    total = features.image.new_zeros(())
    statistics: Statistics = {}
    for term in terms:
        value, extra, samples = _computed(term, features, before, progress)
        after.samples.update({f"{term.type}/{name}": v.detach() for name, v in samples.items()})
        weight, more, run = held_weight(term, features, before.run, progress)
        after.run.update(run)
        total = total + weight * value
        statistics[term.type] = value.detach()
        statistics.update({f"{term.type}/{n}": v.detach() for n, v in {**extra, **more}.items()})
    return LossOutput(total=total, statistics=statistics, memory=after)


def _computed(term: Term, features: Features, memory: Memory, progress: float) -> Remembered:
    if not isinstance(term, RemembersSamples):
        return Remembered(*term.compute(features), {})
    samples = initial_values(term.sample_values, features)
    for name in samples:
        samples[name] = memory.samples.get(f"{term.type}/{name}", samples[name])
    return term.compute_remembering(features, samples, progress=progress)
