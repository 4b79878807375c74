"""Which rank keeps the others waiting.

A collective that waits for a rank says neither that it waits nor for whom. So every rank writes
what it is doing into the store in which the ranks met, and a thread of each looks when its own rank
has made no progress for long.
"""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch.distributed as dist

from vlm.distributed.world import World

__all__ = ["Heartbeat", "watch_ranks"]

PHASES: Final = ("waiting for data", "computing", "saving a checkpoint", "evaluating")
"""Of a step, in their order."""

_log = logging.getLogger(__name__)


class Heartbeat:
    """Tells others where this rank is; see `watch_ranks`."""

    def __init__(self, world: World, store: Any | None) -> None:
        self._world = world
        self._store = store
        self.beats = 0
        """So many so far."""

    def beat(self, step: int, phase: str) -> None:
        """Say that a phase of a step begins; costs one message to rank 0."""
        self.beats += 1
        if self._store is not None:
            text = f"{step} {PHASES.index(phase)} {socket.gethostname()}"
            self._store.set(f"heartbeat/{self._world.rank}", text)

    def behind(self) -> dict[int, str]:
        """The ranks that are behind the foremost, and where; none if all are in one place."""
        places: dict[int, tuple[int, int]] = {}
        hosts = {}
        for rank in range(self._world.size if self._store is not None else 0):
            key = f"heartbeat/{rank}"
            assert self._store is not None
            step, phase, host = ["-1", "0", "an unknown host"]
            if self._store.check([key]):
                step, phase, host = self._store.get(key).decode().split(" ", 2)
            places[rank], hosts[rank] = (int(step), int(phase)), host
        foremost = max(places.values(), default=(0, 0))
        return {
            rank: f"rank {rank} on {hosts[rank]}, {PHASES[phase]} at step {step}"
            for rank, (step, phase) in places.items()
            if (step, phase) < foremost
        }


@contextmanager
def watch_ranks(
    world: World, *, after_seconds: float, say: Callable[[str], None] = _log.warning
) -> Iterator[Heartbeat]:
    """A heartbeat, and a thread that names the ranks which keep this one waiting.

    Only the lowest rank that is not behind speaks, once for each wait.

    Args:
        world: The ranks.
        after_seconds: Without a beat of this rank, it looks for who is behind.
        say: Told who.
    """
    if world.size == 1:
        yield Heartbeat(world, None)
        return
    heartbeat = Heartbeat(world, dist.distributed_c10d._get_default_store())
    ended = threading.Event()

    def watch() -> None:
        seen, told = -1, -1
        while not ended.wait(after_seconds):
            if seen == heartbeat.beats != told:
                told = seen
                behind = heartbeat.behind()
                speaker = min((r for r in range(world.size) if r not in behind), default=-1)
                if behind and speaker == world.rank:
                    say(f"no progress for {after_seconds:g} s: {'; '.join(behind.values())}")
            seen = heartbeat.beats

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield heartbeat
    finally:
        ended.set()
        thread.join()
