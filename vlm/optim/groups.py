"""Which parameters decay, and which are scalars that need their own rule."""

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["parameter_groups"]

_SCALARS = ("log_logit_scale", "logit_bias")
_NEVER_DECAYED = (
    "positional_embedding",
    "class_embedding",
    "query_embedding",
    "pos_embed",
    "cls_token",
)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    scalar_lr: float,
    betas: tuple[float, float],
) -> list[dict[str, Any]]:
    """Three groups: `decay`, `no_decay` and `scalars`; empty ones are left out.

    Weight decay is for matrices and filters alone, not for norms, biases, and embeddings of
    positions and classes. The logit scale and bias take AdamW's rule at `scalar_lr` without decay,
    whatever optimizer the rest takes (`rule` is read by `vlm.optim.Lion`).
    """
    decay, no_decay, scalars = [], [], []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if name.rpartition(".")[2] in _SCALARS:
            scalars.append(parameter)
        elif parameter.ndim < 2 or name.rpartition(".")[2] in _NEVER_DECAYED:
            no_decay.append(parameter)
        else:
            decay.append(parameter)
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": decay, "lr": lr, "betas": betas, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "lr": lr, "betas": betas, "weight_decay": 0.0},
        {
            "name": "scalars",
            "params": scalars,
            "lr": scalar_lr,
            "betas": (0.9, 0.98),
            "weight_decay": 0.0,
            "rule": "adamw",
        },
    ]
    return [group for group in groups if group["params"]]
