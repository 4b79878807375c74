"""Run a function on several gloo ranks and bring back what each returned."""

import os
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlm.distributed import World

RankFunction = Callable[..., Any]


def run_ranks(size: int, function: RankFunction, *args: Any) -> list[Any]:
    """`function(world, *args)` on each rank; it and its arguments must be picklable."""
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        processes = [
            context.Process(target=_rank, args=(rank, size, folder, function, args))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        failed = [p.exitcode for p in processes if p.exitcode != 0]
        assert not failed, f"ranks ended with {failed}"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, folder: str, function: RankFunction, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun sets it; DeepSpeed asks for it
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    try:
        result = function(World(rank=rank, size=size), *args)
    finally:
        dist.destroy_process_group()
    torch.save(result, Path(folder) / f"{rank}.pt")
