"""What every optimizer's settings share."""

from typing import Any, ClassVar

import torch
from pydantic import Field

from vlm.config import Config
from vlm.optim.schedules import ScheduleConfig

__all__ = ["Groups", "OptimizerSettings"]

Groups = list[dict[str, Any]]
"""Parameter groups as torch's optimizers take them."""


class OptimizerSettings(Config):
    """Rates, decay, clipping and schedule. A new optimizer derives from it and builds itself."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(0.2, ge=0)
    """Decay of matrices and filters a step, times the learning rate."""
    scalar_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the logit scale and bias."""
    image_lr_factor: float = Field(1.0, gt=0)
    """The image tower learns at so many times `lr`."""
    text_lr_factor: float = Field(1.0, gt=0)
    """The text tower learns at so many times `lr`."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Each layer below the top of its tower learns at so many times the rate of the one above.

    For fine-tuning; 0.65 to 0.75 is common (BEiT, arXiv:2106.08254, appendix).
    """
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the whole gradient; larger ones are scaled down to it."""
    schedule: ScheduleConfig = ScheduleConfig()

    whole_matrices: ClassVar[bool] = False
    """Whether an update looks at whole matrices, so that engines must not cut them into pieces."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        """The optimizer over groups that have `lr`, `weight_decay`, `betas` and `rule`."""
        raise NotImplementedError

    def advice(self) -> list[str]:
        """What looks wrong about these settings, one line each, with what to change."""
        return []
