"""The only importer of torch.distributed's process groups."""

from vlm.distributed.collectives import (
    any_rank,
    barrier,
    gather_counts,
    gather_rows,
    gather_rows_with_gradient,
    max_over_ranks,
    sum_over_ranks,
    sum_with_gradient,
)
from vlm.distributed.heartbeat import Heartbeat, watch_ranks
from vlm.distributed.sharding import (
    Piece,
    is_sharded,
    piece_of,
    set_gradient_synchronisation,
    shard,
    whole,
)
from vlm.distributed.uneven import gather_bytes, gather_uneven_rows
from vlm.distributed.world import (
    Share,
    World,
    connected_world,
    ranks_to_start,
    share_of_work,
)

__all__ = [
    "Heartbeat",
    "Piece",
    "Share",
    "World",
    "any_rank",
    "barrier",
    "connected_world",
    "gather_bytes",
    "gather_counts",
    "gather_rows",
    "gather_rows_with_gradient",
    "gather_uneven_rows",
    "is_sharded",
    "max_over_ranks",
    "piece_of",
    "ranks_to_start",
    "set_gradient_synchronisation",
    "shard",
    "share_of_work",
    "sum_over_ranks",
    "sum_with_gradient",
    "watch_ranks",
    "whole",
]
