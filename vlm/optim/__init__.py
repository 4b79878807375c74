"""Optimizers, parameter groups and schedules."""

from collections.abc import Callable, Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from vlm.optim.adafactor import AdafactorConfig
from vlm.optim.adamw import AdamWConfig
from vlm.optim.groups import parameter_groups
from vlm.optim.lamb import LambConfig
from vlm.optim.lion import Lion, LionConfig
from vlm.optim.muon import MuonConfig
from vlm.optim.schedules import ScheduleConfig, learning_rate_factor

__all__ = [
    "AdafactorConfig",
    "AdamWConfig",
    "LambConfig",
    "Lion",
    "LionConfig",
    "MuonConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "build_optimizer",
    "learning_rate_factor",
    "parameter_groups",
    "set_learning_rates",
]

OptimizerConfig = Annotated[
    LionConfig | AdamWConfig | LambConfig | AdafactorConfig | MuonConfig,
    Field(discriminator="type"),
]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: LionConfig | AdamWConfig | LambConfig | AdafactorConfig | MuonConfig,
    *,
    depth: Callable[[str], int | None] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups`, each remembering its peak as `initial_lr`.

    Args:
        named_parameters: Those of the model; frozen ones are left out.
        config: The rule and its rates.
        depth: How many layers lie below a parameter, by name, or none behind the last; for
            `config.layer_decay`.

    Raises:
        ValueError: If `config.layer_decay` is set and no `depth` is given.
    """
    groups = parameter_groups(
        named_parameters,
        lr=config.lr,
        weight_decay=config.weight_decay,
        scalar_lr=config.scalar_lr,
        betas=config.betas,
        lr_factors={"image": config.image_lr_factor, "text": config.text_lr_factor},
        layer_decay=config.layer_decay,
        depth=depth,
    )
    for group in groups:
        group["initial_lr"] = group["lr"]
    return config.build(groups)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
