"""Towers and the dual encoder made of them."""

from vlm.models.dual_encoder import DualEncoder, DualEncoderConfig, clamp_logit_scale
from vlm.models.towers import ImageTower, TextTower

__all__ = ["DualEncoder", "DualEncoderConfig", "ImageTower", "TextTower", "clamp_logit_scale"]
