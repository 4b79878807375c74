"""Terms that shape the geometry of the two modalities on the sphere."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.losses.gap import alignment, centroid_uniformity, cross_uniformity, uniformity
from vlm.losses.guard import GapGuard
from vlm.losses.statistics import Statistics
from vlm.losses.weights import WeightedTerm
from vlm.types import Features

__all__ = [
    "AlignmentTerm",
    "CentroidUniformityTerm",
    "CrossUniformityTerm",
    "UniformityTerm",
]


class AlignmentTerm(WeightedTerm):
    """Mean squared distance of pairs; see `alignment`."""

    type: Literal["alignment"] = "alignment"
    guard: GapGuard | None = None
    """Stop raising the weight once the modalities are close."""

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        return alignment(features.image, features.text), {}


class UniformityTerm(WeightedTerm):
    """Mean uniformity of the two modalities; see `uniformity`."""

    type: Literal["uniformity"] = "uniformity"
    t: float = Field(2.0, gt=0)

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        image, text = (
            uniformity(rows, t=self.t, group_ids=features.group_ids, share=features.share)
            for rows in (features.image, features.text)
        )
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
            features.image,
            features.text,
            t=self.t,
            group_ids=features.group_ids,
            share=features.share,
        )
        return value, {}


class CentroidUniformityTerm(WeightedTerm):
    """Uniformity of the midpoints of pairs; see `centroid_uniformity`."""

    type: Literal["centroid_uniformity"] = "centroid_uniformity"
    t: float = Field(2.0, gt=0)

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        value = centroid_uniformity(
            features.image,
            features.text,
            t=self.t,
            group_ids=features.group_ids,
            share=features.share,
        )
        return value, {}
