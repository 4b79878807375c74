"""Pure tensor mathematics: unit rows in, scalars out. No ranks, no gathering, no towers."""

from vlm.losses.caption import caption_loss
from vlm.losses.contrastive import clip_loss
from vlm.losses.decoupled import dcl_loss
from vlm.losses.gap import alignment, centroid_uniformity, cross_uniformity, uniformity
from vlm.losses.sigmoid import siglip_loss
from vlm.losses.terms import LossTerm, total_loss
from vlm.losses.weights import WeightedTerm, WeightSchedule

__all__ = [
    "LossTerm",
    "WeightSchedule",
    "WeightedTerm",
    "alignment",
    "caption_loss",
    "centroid_uniformity",
    "clip_loss",
    "cross_uniformity",
    "dcl_loss",
    "siglip_loss",
    "total_loss",
    "uniformity",
]
