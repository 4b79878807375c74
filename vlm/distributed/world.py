"""Who takes part in this run: rank, size and device, from torchrun's environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from vlm.distributed.meeting import place_to_meet
from vlm.errors import ConfigError

__all__ = ["Share", "World", "connected_world", "ranks_to_start", "share_of_work"]


@dataclass
class Waited:
    """Seconds that this process spent in collectives; on CUDA only in those that block."""

    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    waited: Waited = field(default_factory=Waited, compare=False, repr=False)
    """Told by every collective of `vlm.distributed`."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that speaks and writes."""
        return self.rank == 0


@contextmanager
def connected_world(
    *, timeout_seconds: float = 600.0, always_join: bool = False
) -> Iterator[World]:
    """Join the process group that torchrun describes, or be a world of one; leave it at the end.

    Reads `RANK`, `WORLD_SIZE` and `LOCAL_RANK`. A device is a CUDA device where there is one, with
    NCCL between ranks, and the CPU with gloo elsewhere.

    Args:
        timeout_seconds: A collective that waits longer for a rank fails instead of hanging.
        always_join: Make a process group even for one rank, as DeepSpeed wants.

    Raises:
        ConfigError: If a rank has no CUDA device of its own.
        VlmError: If not all ranks come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local_rank)
    if size == 1 and not always_join:
        yield World(device=device)
        return
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if size == 1:  # needs no rendezvous address
        store: Store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # type: ignore[attr-defined] # exported without a stub
    else:
        shared, rank, size = next(rendezvous("env://", rank, size, timeout=timeout))
        store = place_to_meet(shared, rank, size, timeout_seconds=timeout_seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank=rank, size=size, device=device)
    finally:
        dist.destroy_process_group()


def ranks_to_start(wanted: int | None) -> int:
    """How many ranks a command that trains has on this machine, if nobody started them for it.

    Reads `WORLD_SIZE`: where a launcher set it, this process is all that is to run here.

    Args:
        wanted: As a person said; none is one for each CUDA device, or one on the CPU.
    """
    if "WORLD_SIZE" in os.environ:
        return 1
    return wanted or max(1, torch.cuda.device_count())


@dataclass(frozen=True, kw_only=True)
class Share:
    """One of several processes that divide work and never speak to each other."""

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def share_of_work(*, pods: int | None = None) -> Share:
    """Which share is this process's: torchrun says so, or an Indexed Job of Kubernetes.

    Reads `RANK`, `WORLD_SIZE` and `LOCAL_RANK`, else `JOB_COMPLETION_INDEX`; with none of them
    the whole work is this process's.

    Args:
        pods: Completions of the Indexed Job, which its pods are not told.

    Raises:
        ConfigError: If the index has no count, or a wrong one, or there is no device.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if "WORLD_SIZE" in os.environ:
        index, count = int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"])
        if pods not in (None, count):
            message = f"{pods} pods were promised and torchrun started {count} ranks; leave it out"
            raise ConfigError(message)
    else:
        index, count = int(os.environ.get("JOB_COMPLETION_INDEX", "0")), pods or 1
        if index >= count:
            message = (
                f"this is pod {index} of an Indexed Job (JOB_COMPLETION_INDEX), and {count} share "
                f"the work; say how many there are, as in the job's completions"
            )
            raise ConfigError(message)
    return Share(index=index, count=count, device=_device(local_rank))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        message = (
            f"local rank {local_rank} has no CUDA device: this node has "
            f"{torch.cuda.device_count()}. Start at most one rank per device "
            f"(torchrun --nproc-per-node {torch.cuda.device_count()})."
        )
        raise ConfigError(message)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
