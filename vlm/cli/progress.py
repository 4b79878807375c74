"""What long verbs share: how far they are, line by line, and how they are stopped."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

__all__ = ["StageProgress", "counted", "terminated_as_interrupted"]


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that drafts are removed and workers told."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def counted(number: int, noun: str) -> str:
    """A number and what it counts: one shard, two shards."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class StageProgress:
    """Says how far a stage is, and when it will end.

    Args:
        console: Where to.
        every_seconds: Least time between two lines; the last of a stage is always said.
    """

    def __init__(self, console: Console, *, every_seconds: float = 0.0) -> None:
        self._console = console
        self._every_seconds = every_seconds
        self._stage = ""
        self._start = self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            # The end of the stage before is the start of this one.
            self._stage, self._start = stage, self._last
        if done == total or now - self._last >= self._every_seconds:
            self._last = now
            remaining = (now - self._start) / done * (total - done)
            line = f"{stage} {done}/{total}, ETA {remaining:.0f} s"
            self._console.print(line, highlight=False, markup=False)
