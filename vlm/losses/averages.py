"""Softmax averages over all pairs, tile by tile: what soft targets and their statistics need."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.losses.pairs import Pairs
from vlm.losses.precision import full_precision
from vlm.losses.tiled import blocks, log_sum_exp, tile_side
from vlm.types import WHOLE, RowShare

__all__ = ["SoftmaxAverage", "softmax_average"]


class SoftmaxAverage(NamedTuple):
    """Averages over the columns of each row; zeros for a row that has no pair."""

    values: Float[Tensor, "batch dim"]
    """Mean of the values; gradients flow to the values alone. Zeros in the rows of others' shares:
    whoever reduces them to a number a row sends less than these."""
    logits: Float[Tensor, " batch"]
    """Mean of the logits themselves, without gradient."""
    log_sum_exp: Float[Tensor, " batch"]
    """The logarithm that divides the shares, without gradient."""


def softmax_average(
    rows: Float[Tensor, "batch width"],
    columns: Float[Tensor, "global_batch width"],
    scale: Float[Tensor, "1"],
    values: Float[Tensor, "global_batch dim"],
    *,
    pairs: Pairs,
    share: RowShare = WHOLE,
    tile: int | None = None,
) -> SoftmaxAverage:
    r"""Average of `values` under softmax_j(scale * rows_i . columns_j), without keeping the shares.

    The shares are constants: rows, columns and scale get no gradient.

    Args:
        rows: Of the features that decide the shares, e.g. of a teacher.
        columns: As wide as `rows`.
        scale: The multiplier of their dot products.
        values: One row for each column.
        pairs: What is left out.
        share: The rows that are reduced here, where other processes reduce the others.
        tile: Side of a tile; by default what suits the device.
    """
    rows, columns, scale = rows.detach(), columns.detach(), scale.detach()
    side = tile_side(tile, rows)
    sums = log_sum_exp(rows, columns, scale, pairs=pairs, share=share, tile=side)
    average, logits = _apply(
        _SoftmaxAverage, rows, columns, scale, values, sums, pairs, share, side
    )
    return SoftmaxAverage(values=average, logits=share.total(logits), log_sum_exp=sums)


def _apply(function: type[torch.autograd.Function], *arguments: object) -> Any:
    return function.apply(*arguments)


class _SoftmaxAverage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, values: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        sums, pairs, share, tile = rest
        finite = sums.masked_fill(sums == -torch.inf, torch.inf)  # shares of 0, not nan
        wide = full_precision(values)
        average = wide.new_zeros(len(rows), values.shape[1])
        mean_logits = torch.zeros_like(sums)
        for block in blocks(rows, columns, scale, None, pairs, share, tile):
            shares = (block.logits - finite[block.rows, None]).exp_()
            with torch.autocast(rows.device.type, enabled=False):
                average[block.rows].addmm_(shares, wide[block.columns])
            # A pair left out has logit -inf and share 0.
            mean_logits[block.rows] += shares.mul_(block.logits).nan_to_num_(nan=0.0).sum(dim=1)
        ctx.save_for_backward(rows, columns, scale, finite)
        ctx.pairs, ctx.share, ctx.tile, ctx.kind = pairs, share, tile, values.dtype
        ctx.mark_non_differentiable(mean_logits)
        return average, mean_logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        rows, columns, scale, finite = ctx.saved_tensors
        of_values = gradient.new_zeros(len(columns), gradient.shape[1])
        for block in blocks(rows, columns, scale, None, ctx.pairs, ctx.share, ctx.tile):
            shares = block.logits.sub_(finite[block.rows, None]).exp_()
            with torch.autocast(rows.device.type, enabled=False):
                of_values[block.columns].addmm_(shares.T, gradient[block.rows])
        return None, None, None, of_values.to(ctx.kind), None, None, None, None
