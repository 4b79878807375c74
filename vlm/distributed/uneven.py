"""Gathering of what ranks hold in unequal amounts. The identity in a world of one."""

import torch
from torch import Tensor

from vlm.distributed.collectives import gather_counts, gather_rows
from vlm.distributed.world import World

__all__ = ["gather_bytes", "gather_uneven_rows"]


def gather_uneven_rows(rows: Tensor, world: World) -> Tensor:
    """Concatenate the rows of all ranks in rank order; a rank may bring any number, even none.

    Every rank must bring rows of the same type and width.
    """
    if world.size == 1:
        return rows
    counts = gather_counts(len(rows), world)
    return gather_rows(rows.to(world.device), world, counts=counts).to(rows.device)


def gather_bytes(data: bytes, world: World) -> list[bytes]:
    """The bytes of every rank, in rank order; how they are to be read is the caller's affair."""
    if world.size == 1:
        return [data]
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
    counts = gather_counts(len(data), world)
    parts = gather_rows(own.to(world.device), world, counts=counts).cpu().split(counts)
    return [part.numpy().tobytes() for part in parts]
