"""LAMB, ALIGN's optimizer, as timm keeps it."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from vlm.optim.base import Groups, OptimizerSettings

__all__ = ["LambConfig"]


class LambConfig(OptimizerSettings):
    """LAMB (arXiv:1904.00962); the defaults are ALIGN's (arXiv:2102.05918, section 5).

    Each matrix moves by a step of Adam's direction, scaled to the norm of the matrix. Parameters
    without decay (norms, biases, the logit scale) are not scaled.
    """

    type: Literal["lamb"] = "lamb"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(1e-5, ge=0)
    eps: float = Field(1e-6, gt=0)

    whole_matrices: ClassVar[bool] = True

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        from timm.optim.lamb import Lamb  # noqa: PLC0415 - seconds, only its users pay

        # The engine clips the gradient, of all ranks; timm's would do so again.
        optimizer: torch.optim.Optimizer = Lamb(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, max_grad_norm=None
        )
        return optimizer
