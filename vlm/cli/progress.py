"""How far a long verb is, line by line."""

import time

from rich.console import Console

__all__ = ["StageProgress"]


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
