"""The core of every loss over all pairs: exact reductions of a logit matrix that is never kept.

Rows meet columns tile by tile; each tile is reduced and dropped, and the backward pass computes it
again. For b rows and B columns, autograd keeps the inputs and two numbers a row (and a column,
where both ways are asked for) instead of b x B logits and their softmax.

Where several processes hold the same features, each reduces its share of the rows against all
columns, so its work falls as theirs grows in number; results are whole on all of them, for two
numbers a row and column sent (`vlm.types.RowShare`).

Logits are l_ij = scale * rows_i . columns_j + bias. Whatever is linear in them (positives, label
smoothing) needs no tile and is written out in the losses. Features may be bfloat16 or float16:
tiles are computed and summed in float32, or in float64 for float64 features, under autocast too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.losses.pairs import Pairs
from vlm.losses.precision import full_precision
from vlm.losses.running_sums import RunningSums, join
from vlm.types import WHOLE, RowShare

__all__ = [
    "Block",
    "blocks",
    "log_sum_exp",
    "log_sum_exp_both_ways",
    "softplus_sums",
    "tile_side",
]

_CPU_TILE = 1024  # 4 MiB of float32 logits: large enough for matrix products, small for the cache
_DEVICE_TILE = 4096  # 64 MiB: fewer, larger kernels


def log_sum_exp(
    rows: Float[Tensor, "batch dim"],
    columns: Float[Tensor, "global_batch dim"],
    scale: Float[Tensor, "1"],
    *,
    pairs: Pairs,
    share: RowShare = WHOLE,
    tile: int | None = None,
) -> Float[Tensor, " batch"]:
    """For each row, the log-sum-exp of its logits; -inf for a row that has no pair.

    Args:
        rows: Differentiable, as are `columns` and `scale`.
        columns: As wide as `rows`.
        scale: The multiplier of dot products.
        pairs: What is left out.
        share: The rows that are reduced here, where other processes reduce the others.
        tile: Side of a tile; by default what suits the device.
    """
    side = tile_side(tile, rows)
    by_row, _ = _reduce(_LogSumExp, rows, columns, scale, pairs, False, share, side)
    return by_row


def log_sum_exp_both_ways(
    rows: Float[Tensor, "batch dim"],
    columns: Float[Tensor, "global_batch dim"],
    scale: Float[Tensor, "1"],
    *,
    pairs: Pairs,
    share: RowShare = WHOLE,
    tile: int | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " global_batch"]]:
    """As `log_sum_exp`, for each row and for each column, from one pass over the tiles."""
    side = tile_side(tile, rows)
    by_row, by_column = _reduce(_LogSumExp, rows, columns, scale, pairs, True, share, side)
    return by_row, by_column


def softplus_sums(
    rows: Float[Tensor, "batch dim"],
    columns: Float[Tensor, "global_batch dim"],
    scale: Float[Tensor, "1"],
    bias: Float[Tensor, "1"],
    *,
    pairs: Pairs,
    share: RowShare = WHOLE,
    tile: int | None = None,
) -> Float[Tensor, " batch"]:
    """For each row, the sum of log(1 + exp(logit)); arguments as for `log_sum_exp`."""
    side = tile_side(tile, rows)
    result: Tensor = _reduce(_SoftplusSums, rows, columns, scale, bias, pairs, share, side)
    return result


def _reduce(function: type[torch.autograd.Function], *arguments: object) -> Any:
    return function.apply(*arguments)


def tile_side(tile: int | None, rows: Tensor) -> int:
    """The side asked for, or what suits the device of the rows."""
    if tile is None:
        return _CPU_TILE if rows.device.type == "cpu" else _DEVICE_TILE
    if tile < 1:
        message = f"a tile has at least 1 row and column, got tile={tile}"
        raise ValueError(message)
    return tile


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, pairs: Pairs, both: bool, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        share, tile = rest
        by_row = RunningSums(len(rows), like=rows)
        by_column = RunningSums(len(columns) if both else 0, like=rows)
        for block in blocks(rows, columns, scale, None, pairs, share, tile):
            by_row.add(block.rows, block.logits)
            if both:
                by_column.add(block.columns, block.logits.T)
        join([by_row, by_column], share)
        shares = *by_row.for_shares(), *by_column.for_shares()
        ctx.save_for_backward(rows, columns, scale, *shares)
        ctx.pairs, ctx.both, ctx.share, ctx.tile = pairs, both, share, tile
        return by_row.log(), by_column.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_gradient: Tensor, column_gradient: Tensor) -> Any:
        rows, columns, scale, row_top, row_total, column_top, column_total = ctx.saved_tensors
        both = ctx.share.total(torch.cat([row_gradient, column_gradient]))
        row_gradient, column_gradient = both.split([len(row_gradient), len(column_gradient)])
        row_factor, column_factor = row_gradient / row_total, column_gradient / column_total
        gradients = _Gradients(ctx.needs_input_grad, rows, columns)
        for block in blocks(rows, columns, scale, None, ctx.pairs, ctx.share, ctx.tile):
            weights = (block.logits - row_top[block.rows, None]).exp_()
            weights.mul_(row_factor[block.rows, None])
            if ctx.both:
                shares = block.logits.sub_(column_top[None, block.columns]).exp_()
                weights.addcmul_(shares, column_factor[None, block.columns])
            gradients.add(block, weights)
        return *gradients.of_inputs(rows, columns, scale), None, None, None, None


class _SoftplusSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, *rest: Any
    ) -> Tensor:
        pairs, share, tile = rest
        sums = full_precision(rows[:0]).new_zeros(len(rows))
        for block in blocks(rows, columns, scale, bias, pairs, share, tile):
            sums[block.rows] += F.softplus(block.logits, threshold=30).sum(dim=1)
        ctx.save_for_backward(rows, columns, scale, bias)
        ctx.pairs, ctx.share, ctx.tile = pairs, share, tile
        return share.total(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, columns, scale, bias = ctx.saved_tensors
        gradient = ctx.share.total(gradient)
        gradients = _Gradients(ctx.needs_input_grad, rows, columns)
        bias_gradient = gradient.new_zeros(1)
        for block in blocks(rows, columns, scale, bias, ctx.pairs, ctx.share, ctx.tile):
            weights = block.logits.sigmoid_().mul_(gradient[block.rows, None])
            bias_gradient += weights.sum()
            gradients.add(block, weights)
        of_bias = bias_gradient.to(bias.dtype)
        return *gradients.of_inputs(rows, columns, scale), of_bias, None, None, None


@dataclass(frozen=True, kw_only=True)
class Block:
    """One tile of the logit matrix and where it lies."""

    rows: slice
    columns: slice
    left: Tensor
    """The rows times the scale."""
    right: Tensor
    logits: Tensor
    """-inf where a pair is left out; the receiver may overwrite it."""


def blocks(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    pairs: Pairs,
    share: RowShare,
    tile: int,
) -> Iterator[Block]:
    """The logits of every pair of a row of this process and a column, a tile at a time."""
    for row_span in _spans(share.own(len(rows)), tile):
        left = full_precision(rows[row_span])
        left = left * scale.to(left.dtype)  # cheaper here than on the logits
        for column_span in _spans(slice(0, len(columns)), tile):
            right = full_precision(columns[column_span])
            with torch.autocast(rows.device.type, enabled=False):
                logits = left @ right.T  # [tile tile]
            if bias is not None:
                logits += bias.to(logits.dtype)
            mask = pairs.mask(row_span, column_span, rows.device)
            if mask is not None:
                logits.masked_fill_(mask, -torch.inf)
            yield Block(rows=row_span, columns=column_span, left=left, right=right, logits=logits)


def _spans(whole: slice, tile: int) -> Iterator[slice]:
    starts = range(whole.start, whole.stop, tile)
    return (slice(start, min(start + tile, whole.stop)) for start in starts)


class _Gradients:
    """Sums, over tiles, what the weights dL/dl_ij send back to rows, columns and scale."""

    def __init__(self, needed: tuple[bool, ...], rows: Tensor, columns: Tensor) -> None:
        kind = full_precision(rows[:0])
        self._needed = needed
        # Without the scale, so that its own gradient follows from this one without another tile.
        self._rows = kind.new_zeros(rows.shape) if needed[0] or needed[2] else None
        self._columns = kind.new_zeros(columns.shape) if needed[1] else None

    def add(self, block: Block, weights: Tensor) -> None:
        with torch.autocast(weights.device.type, enabled=False):
            if self._rows is not None:
                self._rows[block.rows].addmm_(weights, block.right)
            if self._columns is not None:
                self._columns[block.columns].addmm_(weights.T, block.left)

    def of_inputs(self, rows: Tensor, columns: Tensor, scale: Tensor) -> list[Tensor | None]:
        """Gradients of rows, columns and scale, in their types; none where none is needed."""
        of_rows = of_columns = of_scale = None
        if self._rows is not None and self._needed[2]:
            # d l_ij / d scale = rows_i . columns_j, and `_rows` has summed weight * columns_j.
            of_scale = (self._rows * rows).sum().reshape(1).to(scale.dtype)
        if self._rows is not None and self._needed[0]:
            of_rows = self._rows.mul_(scale.to(self._rows.dtype)).to(rows.dtype)
        if self._columns is not None:
            of_columns = self._columns.to(columns.dtype)
        return [of_rows, of_columns, of_scale]
