"""A polite end: the first signal asks, the second interrupts."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

__all__ = ["Stop", "stop_on_signal"]

_TOLD = b"\nstopping: the step in progress is finished and saved; Ctrl-C again ends at once\n"


@dataclass
class Stop:
    """Whether somebody asked the run to end."""

    requested: bool = field(default=False)


@contextmanager
def stop_on_signal(*, tell: bool = False) -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a flag; a second SIGINT interrupts at once.

    Args:
        tell: Say so at the first SIGINT, which a person has sent.
    """
    stop = Stop()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if tell and number == signal.SIGINT and not stop.requested:
            os.write(sys.stderr.fileno(), _TOLD)  # printing is not safe in a handler
        stop.requested = True

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
