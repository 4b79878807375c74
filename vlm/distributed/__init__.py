"""The only importer of torch.distributed's process groups."""

from vlm.distributed.collectives import (
    any_rank,
    barrier,
    gather_rows,
    gather_rows_with_gradient,
    sum_over_ranks,
    sum_with_gradient,
)
from vlm.distributed.uneven import gather_bytes, gather_uneven_rows
from vlm.distributed.world import World, connected_world

__all__ = [
    "World",
    "any_rank",
    "barrier",
    "connected_world",
    "gather_bytes",
    "gather_rows",
    "gather_rows_with_gradient",
    "gather_uneven_rows",
    "sum_over_ranks",
    "sum_with_gradient",
]
