"""The moving average of a model's weights, which is what is exported."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["start_average", "update_average"]


def start_average(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A float32 copy of the weights, sharded as they are."""
    return {
        name: tensor.detach().float().clone() if tensor.is_floating_point() else tensor.clone()
        for name, tensor in weights.items()
    }


@torch.no_grad()
def update_average(
    average: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, decay: float, step: int
) -> None:
    """Move the average towards the weights, faster at the start when it holds the random ones."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, mean in average.items():
        if mean.is_floating_point():
            mean.lerp_(weights[name].to(device=mean.device, dtype=mean.dtype), 1 - decay)
        else:
            mean.copy_(weights[name])
