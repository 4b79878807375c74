"""Gathering of what ranks hold in unequal amounts. The identity in a world of one."""

import torch
from torch import Tensor

from vlm.distributed.collectives import gather_rows
from vlm.distributed.world import World

__all__ = ["gather_bytes", "gather_uneven_rows"]


def gather_uneven_rows(rows: Tensor, world: World) -> Tensor:
    """Concatenate the rows of all ranks in rank order; a rank may bring any number, even none.

    Every rank must bring rows of the same type and width.
    """
    if world.size == 1:
        return rows
    counts = gather_rows(torch.tensor([len(rows)], device=world.device), world).tolist()
    most = max(counts)
    padded = torch.zeros((most, *rows.shape[1:]), dtype=rows.dtype, device=world.device)
    padded[: len(rows)] = rows
    gathered = gather_rows(padded, world).to(rows.device)
    return torch.cat([gathered[r * most : r * most + n] for r, n in enumerate(counts)])


def gather_bytes(data: bytes, world: World) -> list[bytes]:
    """The bytes of every rank, in rank order; how they are to be read is the caller's affair."""
    if world.size == 1:
        return [data]
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
    counts = gather_rows(torch.tensor([len(data)], device=world.device), world).tolist()
    parts = gather_uneven_rows(own, world).split(counts)
    return [part.numpy().tobytes() for part in parts]
