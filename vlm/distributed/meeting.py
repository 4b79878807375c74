"""A place in the store where the ranks of one start meet, and no rank of an earlier one.

torchrun starts ranks again after one has died, and gives them the store of those before, with the
addresses of dead ranks in it (torch 2.13, static and c10d rendezvous alike). A rank that reads one
of those before its new owner writes it waits for nobody. The count of restarts cannot tell starts
apart: nodes that only follow a restart do not count it.
"""

import time
import uuid
from collections.abc import Iterable
from typing import Final

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from vlm.errors import VlmError

__all__ = ["place_to_meet"]

_PAUSE_SECONDS: Final = 0.02


def place_to_meet(store: Store, rank: int, size: int, *, timeout_seconds: float) -> Store:
    """A part of the store that is empty when the ranks of this start have come together in it.

    Rank 0 names it. Each other rank greets under a word that is new each time, and is answered
    under that word; so an answer cannot be one to a dead rank, and a greeting of a dead rank is
    answered in vain, until its successor's stands in its place.

    Args:
        store: Which all ranks reach, whatever is left in it.
        rank: Of this process.
        size: Number of ranks.
        timeout_seconds: To wait for all others.

    Raises:
        VlmError: If some do not come.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        _answer_all(store, own, size, timeout_seconds)
        return PrefixStore(own, store)
    store.set(_greeting(rank), own)
    try:
        name = store.get(f"answer/{own}").decode()
    except dist.DistStoreError as error:
        message = (
            f"rank {rank} of {size}: no answer from rank 0, which did not start or did not reach "
            f"the others; look at what its node says"
        )
        raise VlmError(message) from error
    store.set(_arrival(name, rank), "")
    return PrefixStore(name, store)


def _answer_all(store: Store, name: str, size: int, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    answered: dict[int, bytes] = {}
    missing = set(range(1, size))
    while missing:
        for rank in missing:
            if store.check([_greeting(rank)]):
                greeting = store.get(_greeting(rank))
                if answered.get(rank) != greeting:
                    store.set(f"answer/{greeting.decode()}", name)
                    answered[rank] = greeting
        missing -= {rank for rank in missing if store.check([_arrival(name, rank)])}
        if missing and time.monotonic() > deadline:
            message = (
                f"rank {_listed(missing)} of {size} did not come within {timeout_seconds:g} s; "
                f"look at what their nodes say"
            )
            raise VlmError(message)
        time.sleep(_PAUSE_SECONDS if missing else 0)


def _greeting(rank: int) -> str:
    return f"greeting/{rank}"


def _arrival(name: str, rank: int) -> str:
    return f"here/{name}/{rank}"


def _listed(ranks: Iterable[int]) -> str:
    first, *others = sorted(ranks)
    return ", ".join(str(rank) for rank in [first, *others[:9]]) + (", …" if others[9:] else "")
