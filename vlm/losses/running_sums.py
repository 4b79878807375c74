"""Sums of exponentials over tiles, and over processes that each had some of the tiles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm.losses.precision import full_precision
from vlm.types import RowShare

__all__ = ["RunningSums", "join"]


class RunningSums:
    """Sums of exponentials of many lines, over tiles, as exp(top) * total.

    The two stay apart until the end: at a logit scale of 100 their joint logarithm would round
    away the share of all negatives of a batch that is nearly solved.
    """

    def __init__(self, length: int, *, like: Tensor) -> None:
        self.top = full_precision(like[:0]).new_full((length,), -torch.inf)
        self.total = torch.zeros_like(self.top)

    def add(self, lines: slice, logits: Tensor) -> None:
        """Take in a tile whose first axis runs over `lines`."""
        top = torch.maximum(self.top[lines], logits.amax(dim=1))
        finite = _finite(top)
        self.total[lines] *= (self.top[lines] - finite).exp_()
        self.total[lines] += (logits - finite[:, None]).exp_().sum(dim=1)
        self.top[lines] = top

    def log(self) -> Tensor:
        return self.top + self.total.log()

    def for_shares(self) -> tuple[Tensor, Tensor]:
        """Top and total such that exp(logit - top) / total is a share; 0 in a line of no pairs."""
        empty = self.top == -torch.inf
        return self.top.masked_fill(empty, 0.0), self.total.masked_fill(empty, torch.inf)


def join(sums: Sequence[RunningSums], share: RowShare) -> None:
    """Add to these sums those of all other processes, in two messages for all of them."""
    if share.count == 1:
        return
    lengths = [len(part.top) for part in sums]
    top = torch.cat([part.top for part in sums])
    total = torch.cat([part.total for part in sums])
    highest = share.largest(top)
    total = share.total(total * (top - _finite(highest)).exp())
    for part, tops, totals in zip(sums, highest.split(lengths), total.split(lengths), strict=True):
        part.top, part.total = tops, totals


def _finite(top: Tensor) -> Tensor:
    return top.clamp(min=torch.finfo(top.dtype).min)  # -inf - -inf would be nan
