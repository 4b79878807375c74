"""The precision of the losses."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["full_precision"]


def full_precision(features: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Features in the type that logits are computed in: float32, or float64 if they have it."""
    return features.to(torch.promote_types(features.dtype, torch.float32))
