"""Pure tensor mathematics: unit rows in, scalars out. No ranks, no gathering, no towers."""

from vlm.losses.caption import caption_loss, caption_sum
from vlm.losses.consistency import cyclic_consistency
from vlm.losses.contrastive import clip_loss
from vlm.losses.decoupled import dcl_loss
from vlm.losses.gap import alignment, centroid_uniformity, cross_uniformity, uniformity
from vlm.losses.memory import RemembersSamples, initial_sample_values
from vlm.losses.pairs import NoPairsError
from vlm.losses.precision import full_precision
from vlm.losses.refinement import hybrid_distillation_loss, random_alignment_loss
from vlm.losses.sigmoid import siglip_loss
from vlm.losses.soft import SoftTarget, soft_target_loss
from vlm.losses.terms import LossTerm, total_loss
from vlm.losses.weights import WeightedTerm, WeightSchedule

__all__ = [
    "LossTerm",
    "NoPairsError",
    "RemembersSamples",
    "SoftTarget",
    "WeightSchedule",
    "WeightedTerm",
    "alignment",
    "caption_loss",
    "caption_sum",
    "centroid_uniformity",
    "clip_loss",
    "cross_uniformity",
    "cyclic_consistency",
    "dcl_loss",
    "full_precision",
    "hybrid_distillation_loss",
    "initial_sample_values",
    "random_alignment_loss",
    "siglip_loss",
    "soft_target_loss",
    "total_loss",
    "uniformity",
]
