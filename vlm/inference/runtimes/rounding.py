"""Weights in bf16 whose products stay near those in fp32.

Rounding each weight to its nearest neighbour ignores that inputs are correlated: what one weight
loses, others that see much the same can make up. Source: GPTQ (arXiv:2210.17323, algorithm 1), with
the grid of bf16 in place of integers.
"""

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["round_weights"]

_BLOCK: Final = 128
_DAMPING: Final = 0.01
"""Of the mean of the diagonal, so that few inputs decide no direction that they do not show."""


def round_weights(
    weights: Float[Tensor, "out in"], moments: Float[Tensor, "in in"]
) -> Float[Tensor, "out in"]:
    """Round a layer's weights, each to one side, so that its outputs change least.

    Args:
        weights: In float32.
        moments: Sums of products of centred inputs, over what the layer is fitted to.

    Returns:
        Weights that bf16 holds exactly, in float32.
    """
    left = weights.clone()
    rounded = torch.empty_like(left)
    factor = _factor(moments)
    for start in range(0, left.shape[1], _BLOCK):
        stop = min(start + _BLOCK, left.shape[1])
        block, errors = left[:, start:stop], []
        for column in range(stop - start):
            row = factor[start + column, start:stop]
            nearest = block[:, column].bfloat16().float()
            rounded[:, start + column] = nearest
            error = (block[:, column] - nearest) / row[column]
            block[:, column + 1 :] -= error[:, None] * row[None, column + 1 :]
            errors.append(error)
        left[:, stop:] -= torch.stack(errors, dim=1) @ factor[start:stop, stop:]
    return rounded


def _factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped moments' inverse."""
    damped = moments.double()
    damping = _DAMPING * damped.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped = damped + damping * torch.eye(len(damped), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
