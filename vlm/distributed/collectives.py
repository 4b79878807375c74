"""What ranks tell each other. Every function is the identity in a world of one."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlm.distributed.world import World

__all__ = [
    "any_rank",
    "barrier",
    "gather_counts",
    "gather_rows",
    "gather_rows_with_gradient",
    "max_over_ranks",
    "sum_over_ranks",
    "sum_with_gradient",
]


def gather_rows(rows: Tensor, world: World, *, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate the rows of all ranks in rank order, without gradient.

    Args:
        rows: This rank's, of one type and width on all ranks.
        world: The ranks.
        counts: How many rows each rank brings, where they are not equally many; what none can be
            told without a message of its own, `gather_counts`.

    Raises:
        ValueError: If `counts` says something else about this rank.
    """
    if world.size == 1:
        return rows
    if counts is None or len(set(counts)) == 1:
        return torch.cat(_from_all(rows, world))
    if len(counts) != world.size or counts[world.rank] != len(rows):
        message = f"rank {world.rank} brings {len(rows)} rows, and counts={list(counts)}"
        raise ValueError(message)
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = _from_all(padded, world)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_counts(count: int, world: World) -> list[int]:
    """The number that each rank brings, in rank order: one small message."""
    if world.size == 1:
        return [count]
    found: list[int] = gather_rows(torch.tensor([count], device=world.device), world).tolist()
    return found


def _from_all(rows: Tensor, world: World) -> list[Tensor]:
    parts = [rows.new_empty(rows.shape) for _ in range(world.size)]
    with _counted(world):
        dist.all_gather(parts, rows.contiguous())
    return parts


def gather_rows_with_gradient(
    rows: Tensor, world: World, *, counts: Sequence[int] | None = None
) -> Tensor:
    """Concatenate the rows of all ranks in rank order; gradients flow back to their owners.

    The backward pass sums the gradients that all ranks hold for a row. When every rank computes
    the same global loss, that sum is W times the true gradient, and the mean over ranks that data
    parallelism takes afterwards divides it by W again: parameter gradients are exact. So they are
    when ranks share the work, each with W times its part of the gradient (`vlm.types.RowShare`).
    Neither depends on how many rows each rank brings; `counts` is as for `gather_rows`.
    """
    if world.size == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, world, counts)  # type: ignore[no-untyped-call] # torch has no types here
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, counts: Sequence[int] | None) -> Tensor:
        first = world.rank * len(rows) if counts is None else sum(counts[: world.rank])
        ctx.world, ctx.slice = world, slice(first, first + len(rows))
        return gather_rows(rows, world, counts=counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # A copy: autograd may hand the same gradient to others.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        with _counted(ctx.world):
            dist.all_reduce(total)
        return total[ctx.slice], None, None


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """The sum of the tensors of all ranks, without gradient; all ranks get the same."""
    if world.size == 1:
        return values
    total = values.clone()
    with _counted(world):
        dist.all_reduce(total)
    return total


def max_over_ranks(values: Tensor, world: World) -> Tensor:
    """The largest of each element over all ranks, without gradient; all ranks get the same."""
    if world.size == 1:
        return values
    largest = values.detach().clone()
    with _counted(world):
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def sum_with_gradient(values: Tensor, world: World) -> Tensor:
    """The sum over all ranks of equally shaped tensors, the same on every rank.

    The backward pass sums gradients too: as with `gather_rows_with_gradient`, W equal losses give
    W times the true gradient, and the mean of data parallelism divides it by W again.
    """
    if world.size == 1:
        return values
    total: Tensor = _Sum.apply(values, world)  # type: ignore[no-untyped-call] # torch has no types here
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, world: World) -> Tensor:
        ctx.world = world
        total = values.detach().clone(memory_format=torch.contiguous_format)
        with _counted(world):
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        with _counted(ctx.world):
            dist.all_reduce(total)
        return total, None


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on at least one rank; all ranks get the same answer."""
    if world.size == 1:
        return flag
    votes = torch.tensor([int(flag)], device=world.device)
    dist.all_reduce(votes)
    return bool(votes.item())


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()


@contextmanager
def _counted(world: World) -> Iterator[None]:
    """Count the seconds of a collective."""
    start = time.monotonic()
    try:
        yield
    finally:
        world.waited.seconds += time.monotonic() - start
