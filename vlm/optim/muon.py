"""Muon for the matrices inside the towers, AdamW for the rest: both torch's own."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from vlm.optim.base import Groups, OptimizerSettings
from vlm.optim.together import Together

__all__ = ["MuonConfig"]


class MuonConfig(OptimizerSettings):
    """Muon with AdamW beside it, at AdamW's rates and decay (arXiv:2502.16982, section 2.2).

    The momentum of each hidden matrix is orthogonalised by five Newton-Schulz steps before it is
    applied, scaled so that entries move as far as AdamW's do. Embeddings, filters, projections
    into the shared space and everything of one dimension take AdamW.
    """

    type: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1)
    """Of the matrices; `betas` are AdamW's."""
    eps: float = Field(1e-6, gt=0)
    """AdamW's."""

    whole_matrices: ClassVar[bool] = True

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        hidden = [group for group in groups if group["hidden"]]
        others = [group for group in groups if not group["hidden"]]
        parts: list[torch.optim.Optimizer] = []
        if hidden:
            parts.append(
                torch.optim.Muon(
                    hidden,
                    lr=self.lr,
                    momentum=self.momentum,
                    weight_decay=self.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            parts.append(torch.optim.AdamW(others, lr=self.lr, betas=self.betas, eps=self.eps))
        return Together(parts)
