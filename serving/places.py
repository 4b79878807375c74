"""Which of several worker processes this is, without anybody who hands out numbers."""

import fcntl
import time
from pathlib import Path
from typing import IO, Final

__all__ = ["claim_place"]

_PATIENCE_SECONDS: Final = 60
# A place is held by an open file: the system gives it back when the process ends, however it does.
_held: list[IO[str]] = []


def claim_place(folder: Path, places: int) -> int:
    """The first place that no living process holds, from 0; held until this process ends.

    A process that was killed leaves its place to the one that is started for it, so that each
    device always has its own.

    Args:
        folder: The same for all of them.
        places: How many there are, one for each process.

    Raises:
        TimeoutError: If all are held, by processes that do not end.
    """
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        for place in range(places):
            file = (folder / f"place-{place}").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _held.append(file)
            return place
        time.sleep(0.1)  # the process before is still ending
    message = f"all {places} places in {folder} are held by other processes"
    raise TimeoutError(message)
