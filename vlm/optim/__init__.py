"""Optimizers, parameter groups and schedules."""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from vlm.config import Config
from vlm.optim.groups import parameter_groups
from vlm.optim.lion import Lion
from vlm.optim.schedules import ScheduleConfig, learning_rate_factor

__all__ = [
    "AdamWConfig",
    "Lion",
    "LionConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "build_optimizer",
    "learning_rate_factor",
    "parameter_groups",
    "set_learning_rates",
]


class _OptimizerConfig(Config):
    scalar_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the logit scale and bias, which learn by AdamW."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the whole gradient; larger ones are scaled down to it."""
    schedule: ScheduleConfig = ScheduleConfig()


class LionConfig(_OptimizerConfig):
    """Lion (arXiv:2302.06675); 3 to 10 times less `lr` and more `weight_decay` than AdamW."""

    type: Literal["lion"] = "lion"
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(2.0, ge=0)


class AdamWConfig(_OptimizerConfig):
    """AdamW (arXiv:1711.05101)."""

    type: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(0.2, ge=0)
    eps: float = Field(1e-6, gt=0)


OptimizerConfig = Annotated[LionConfig | AdamWConfig, Field(discriminator="type")]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: LionConfig | AdamWConfig
) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups`, each remembering its peak as `initial_lr`."""
    groups = parameter_groups(
        named_parameters,
        lr=config.lr,
        weight_decay=config.weight_decay,
        scalar_lr=config.scalar_lr,
        betas=config.betas,
    )
    for group in groups:
        group["initial_lr"] = group["lr"]
    if config.type == "lion":
        return Lion(groups, lr=config.lr, betas=config.betas)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
