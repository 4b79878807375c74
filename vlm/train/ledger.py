"""Where the time of a run goes: every second is in one place, so the places sum to wall time."""

import time
from collections.abc import Callable

__all__ = ["PLACES", "Ledger"]

PLACES = ("startup", "data", "compute", "communication", "checkpoint", "evaluation", "stalls")
"""`stalls` is waiting for other ranks outside a step, logging, and all that has no other place."""


class Ledger:
    """A clock that always runs in one of `PLACES`.

    Args:
        communicated: Seconds spent so far waiting in collectives, if they are counted; they are
            taken out of `compute` and put into `communication`.
        clock: Seconds, never falling.
        started: When the clock began, by `clock`; none: now.
    """

    def __init__(
        self,
        *,
        communicated: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ) -> None:
        self._clock = clock
        self._communicated = communicated
        self._place = "startup"
        self._since = clock() if started is None else started
        self._communicated_before = communicated()
        self._seconds = dict.fromkeys(PLACES, 0.0)

    def enter(self, place: str) -> None:
        """From now on time goes to `place`."""
        now, communicated = self._clock(), self._communicated()
        spent = now - self._since
        if self._place == "compute":
            waited = min(communicated - self._communicated_before, spent)
            self._seconds["communication"] += waited
            spent -= waited
        self._seconds[self._place] += spent
        self._place, self._since, self._communicated_before = place, now, communicated

    def take(self) -> dict[str, float]:
        """Seconds by place since the last call, and start anew in the same place."""
        self.enter(self._place)
        taken, self._seconds = self._seconds, dict.fromkeys(PLACES, 0.0)
        return taken
