"""One process trains a run at a time: two would write into each other's checkpoints."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from vlm.distributed import World, any_rank
from vlm.errors import CheckpointError

__all__ = ["alone_in"]

_PATIENCE_SECONDS: Final = 5.0


@contextmanager
def alone_in(folder: Path, world: World) -> Iterator[None]:
    """Hold a run's folder, which is made if need be; all ranks call it, and rank 0 holds.

    The lock is the kernel's, so it ends with the process however that ends. Where a file system
    knows no locks, nothing is held.

    Raises:
        CheckpointError: If another run of that name is going on.
    """
    file = None
    holder: str | None = None
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while (holder := _held_by_another(file)) is not None and time.monotonic() < deadline:
            time.sleep(0.1)  # a job that was put back may still be ending
    try:
        if any_rank(holder is not None, world):
            message = (
                f"{folder}: another process trains this run ({holder or 'rank 0 says which'}). "
                f"Wait for its end, or choose another name (name=...)"
            )
            raise CheckpointError(message)
        yield
    finally:
        if file is not None:
            file.close()


def _held_by_another(file: IO[str]) -> str | None:
    """Take the lock, or say who has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "it does not say which"
    except OSError:
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return None
