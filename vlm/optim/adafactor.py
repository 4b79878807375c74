"""Adafactor, CoCa's optimizer, as timm keeps it."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from vlm.optim.base import Groups, OptimizerSettings

__all__ = ["AdafactorConfig"]


class AdafactorConfig(OptimizerSettings):
    """Adafactor with momentum, as large vision models use it; the defaults are CoCa's.

    The second moment of a matrix is kept as its row and column means; the momentum is kept in
    bfloat16. `betas[1]` is the cap of a decay that starts lower. The decay is multiplied by the
    learning rate, as AdamW's is; CoCa's paper does not say whether its own is.

    Source: section 3.4 of arXiv:2106.04560 after arXiv:1804.04235; rates of arXiv:2205.01917.
    """

    type: Literal["adafactor"] = "adafactor"
    lr: float = Field(8e-4, gt=0)
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)

    whole_matrices: ClassVar[bool] = True

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        from timm.optim.adafactor_bv import (  # noqa: PLC0415 - seconds, only its users pay
            AdafactorBigVision,
        )

        momentum, cap = self.betas
        optimizer: torch.optim.Optimizer = AdafactorBigVision(
            groups, lr=self.lr, momentum=momentum, beta2_cap=cap
        )
        return optimizer
