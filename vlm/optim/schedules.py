"""The learning rate over a run, as a factor of its peak."""

import math
from typing import Literal

from pydantic import Field, model_validator

from vlm.config import Config

__all__ = ["ScheduleConfig", "learning_rate_factor"]


class ScheduleConfig(Config):
    """Linear warm-up, then one of four ways down."""

    type: Literal["cosine", "linear", "constant", "rsqrt"] = "cosine"
    """`constant` stays at the peak until the cool-down; `rsqrt` falls as 1/sqrt(step) after it."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Fraction of all steps in which the rate rises from 0 to the peak."""
    warmup_steps: int | None = Field(None, ge=0)
    """The same as a number of steps; where given, `warmup_fraction` is not used."""
    warmup_samples: int | None = Field(None, ge=0)
    """The same as a number of samples, rounded up to whole steps."""
    cooldown_fraction: float = Field(0.2, ge=0, le=1)
    """Last fraction of all steps, falling linearly; for `constant` and `rsqrt` alone."""
    cooldown_samples: int | None = Field(None, ge=0)
    """The same as a number of samples; where given, `cooldown_fraction` is not used."""
    final_fraction: float = Field(0.0, ge=0, le=1)
    """What is left of the peak at the end."""

    @model_validator(mode="after")
    def _one_warmup(self) -> "ScheduleConfig":
        if self.warmup_steps is not None and self.warmup_samples is not None:
            message = "give warmup_steps or warmup_samples, not both"
            raise ValueError(message)
        return self


def learning_rate_factor(
    config: ScheduleConfig, step: int, total_steps: int, *, global_batch: int = 1
) -> float:
    """The factor for step `step` (counted from 0) of `total_steps`, in [0, 1].

    `global_batch` is the samples of a step; it matters to what is given in samples alone.
    """
    warmup = _warmup_steps(config, total_steps, global_batch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total_steps - warmup, 1)
    floor = config.final_fraction
    if config.type == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.type == "linear":
        return floor + (1 - floor) * (1 - progress)
    peak = 1.0
    if config.type == "rsqrt":
        peak = math.sqrt(max(warmup, 1) / max(step, warmup, 1))
    cooldown = config.cooldown_fraction * total_steps
    if config.cooldown_samples is not None:
        cooldown = config.cooldown_samples / global_batch
    remaining = (total_steps - step) / max(cooldown, 1e-12)
    return peak * (floor + (1 - floor) * min(1.0, remaining))


def _warmup_steps(config: ScheduleConfig, total_steps: int, global_batch: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    if config.warmup_samples is not None:
        return math.ceil(config.warmup_samples / global_batch)
    return round(config.warmup_fraction * total_steps)
