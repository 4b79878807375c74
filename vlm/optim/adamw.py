"""AdamW, torch's own."""

from typing import Literal

import torch
from pydantic import Field

from vlm.optim.base import Groups, OptimizerSettings

__all__ = ["AdamWConfig"]


class AdamWConfig(OptimizerSettings):
    """AdamW (arXiv:1711.05101)."""

    type: Literal["adamw"] = "adamw"
    eps: float = Field(1e-6, gt=0)

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)

    def as_lion(self) -> str:
        """The overrides that bring about the same strength of learning and decay under Lion.

        A tenth of the rate and ten times the decay, so that their product stays (section 5 of
        arXiv:2302.06675 gives 3 to 10 times).
        """
        return (
            f"optim.type=lion optim.lr={self.lr / 10:.2g} "
            f"optim.weight_decay={self.weight_decay * 10:.2g}"
        )
