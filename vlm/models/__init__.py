"""Towers, and the models made of them."""

from vlm.models.build import Model, ModelConfig, build_model
from vlm.models.coca import CoCa, CocaConfig
from vlm.models.depths import parameter_depth, parameter_depths
from vlm.models.dual_encoder import (
    DualEncoder,
    DualEncoderConfig,
    clamp_logit_scale,
    set_logit_scale,
)
from vlm.models.start import load_initial_weights
from vlm.models.towers import ImageTower, TextTower

__all__ = [
    "CoCa",
    "CocaConfig",
    "DualEncoder",
    "DualEncoderConfig",
    "ImageTower",
    "Model",
    "ModelConfig",
    "TextTower",
    "build_model",
    "clamp_logit_scale",
    "load_initial_weights",
    "parameter_depth",
    "parameter_depths",
    "set_logit_scale",
]
