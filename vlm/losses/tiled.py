"""The core of every loss over all pairs: exact reductions of a logit matrix that is never kept.

Rows meet columns tile by tile; each tile is reduced and dropped, and the backward pass computes it
again. For b rows and B columns, autograd keeps the inputs and two numbers a row (and a column,
where both ways are asked for) instead of b x B logits and their softmax.

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

__all__ = [
    "Block",
    "blocks",
    "full_precision",
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
    tile: int | None = None,
) -> Float[Tensor, " batch"]:
    """For each row, the log-sum-exp of its logits; -inf for a row that has no pair.

    Args:
        rows: Differentiable, as are `columns` and `scale`.
        columns: As wide as `rows`.
        scale: The multiplier of dot products.
        pairs: What is left out.
        tile: Side of a tile; by default what suits the device.
    """
    by_row, _ = _reduce(_LogSumExp, rows, columns, scale, pairs, False, tile_side(tile, rows))
    return by_row


def log_sum_exp_both_ways(
    rows: Float[Tensor, "batch dim"],
    columns: Float[Tensor, "global_batch dim"],
    scale: Float[Tensor, "1"],
    *,
    pairs: Pairs,
    tile: int | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " global_batch"]]:
    """As `log_sum_exp`, for each row and for each column, from one pass over the tiles."""
    by_row, by_column = _reduce(
        _LogSumExp, rows, columns, scale, pairs, True, tile_side(tile, rows)
    )
    return by_row, by_column


def softplus_sums(
    rows: Float[Tensor, "batch dim"],
    columns: Float[Tensor, "global_batch dim"],
    scale: Float[Tensor, "1"],
    bias: Float[Tensor, "1"],
    *,
    pairs: Pairs,
    tile: int | None = None,
) -> Float[Tensor, " batch"]:
    """For each row, the sum of log(1 + exp(logit)); arguments as for `log_sum_exp`."""
    result: Tensor = _reduce(
        _SoftplusSums, rows, columns, scale, bias, pairs, tile_side(tile, rows)
    )
    return result


def full_precision(features: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Features in the type that logits are computed in: float32, or float64 if they have it."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


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
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, pairs: Pairs, both: bool, tile: int
    ) -> tuple[Tensor, Tensor]:
        by_row = _RunningSums(len(rows), like=rows)
        by_column = _RunningSums(len(columns) if both else 0, like=rows)
        for block in blocks(rows, columns, scale, None, pairs, tile):
            by_row.add(block.rows, block.logits)
            if both:
                by_column.add(block.columns, block.logits.T)
        shares = *by_row.for_shares(), *by_column.for_shares()
        ctx.save_for_backward(rows, columns, scale, *shares)
        ctx.pairs, ctx.both, ctx.tile = pairs, both, tile
        return by_row.log(), by_column.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_gradient: Tensor, column_gradient: Tensor) -> Any:
        rows, columns, scale, row_top, row_total, column_top, column_total = ctx.saved_tensors
        row_factor, column_factor = row_gradient / row_total, column_gradient / column_total
        gradients = _Gradients(ctx.needs_input_grad, rows, columns)
        for block in blocks(rows, columns, scale, None, ctx.pairs, ctx.tile):
            weights = (block.logits - row_top[block.rows, None]).exp_()
            weights.mul_(row_factor[block.rows, None])
            if ctx.both:
                shares = block.logits.sub_(column_top[None, block.columns]).exp_()
                weights.addcmul_(shares, column_factor[None, block.columns])
            gradients.add(block, weights)
        return *gradients.of_inputs(rows, columns, scale), None, None, None


class _RunningSums:
    """Sums of exponentials of many lines, over tiles, as exp(top) * total.

    The two stay apart until the end: at a logit scale of 100 their joint logarithm would round
    away the share of all negatives of a batch that is nearly solved.
    """

    def __init__(self, length: int, *, like: Tensor) -> None:
        self._top = full_precision(like[:0]).new_full((length,), -torch.inf)
        self._total = torch.zeros_like(self._top)

    def add(self, lines: slice, logits: Tensor) -> None:
        """Take in a tile whose first axis runs over `lines`."""
        top = torch.maximum(self._top[lines], logits.amax(dim=1))
        finite = top.clamp(min=torch.finfo(top.dtype).min)  # -inf - -inf would be nan
        self._total[lines] *= (self._top[lines] - finite).exp_()
        self._total[lines] += (logits - finite[:, None]).exp_().sum(dim=1)
        self._top[lines] = top

    def log(self) -> Tensor:
        return self._top + self._total.log()

    def for_shares(self) -> tuple[Tensor, Tensor]:
        """Top and total such that exp(logit - top) / total is a share; 0 in a line of no pairs."""
        empty = self._top == -torch.inf
        return self._top.masked_fill(empty, 0.0), self._total.masked_fill(empty, torch.inf)


class _SoftplusSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, *rest: Any
    ) -> Tensor:
        pairs, tile = rest
        sums = full_precision(rows[:0]).new_zeros(len(rows))
        for block in blocks(rows, columns, scale, bias, pairs, tile):
            sums[block.rows] += F.softplus(block.logits, threshold=30).sum(dim=1)
        ctx.save_for_backward(rows, columns, scale, bias)
        ctx.pairs, ctx.tile = pairs, tile
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, columns, scale, bias = ctx.saved_tensors
        gradients = _Gradients(ctx.needs_input_grad, rows, columns)
        bias_gradient = gradient.new_zeros(1)
        for block in blocks(rows, columns, scale, bias, ctx.pairs, ctx.tile):
            weights = block.logits.sigmoid_().mul_(gradient[block.rows, None])
            bias_gradient += weights.sum()
            gradients.add(block, weights)
        return *gradients.of_inputs(rows, columns, scale), bias_gradient.to(bias.dtype), None, None


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
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, pairs: Pairs, tile: int
) -> Iterator[Block]:
    """The logits of every pair of a row and a column, a tile at a time."""
    for row_span in _spans(len(rows), tile):
        left = full_precision(rows[row_span])
        left = left * scale.to(left.dtype)  # cheaper here than on the logits
        for column_span in _spans(len(columns), tile):
            right = full_precision(columns[column_span])
            with torch.autocast(rows.device.type, enabled=False):
                logits = left @ right.T  # [tile tile]
            if bias is not None:
                logits += bias.to(logits.dtype)
            mask = pairs.mask(row_span, column_span, rows.device)
            if mask is not None:
                logits.masked_fill_(mask, -torch.inf)
            yield Block(rows=row_span, columns=column_span, left=left, right=right, logits=logits)


def _spans(length: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, length)) for start in range(0, length, tile))


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
