"""A folder that is being filled with shards: locked, described, and cleaned when it is complete.

writing.json   source and options; there from before the first shard until the manifest is
.writing/      what is only needed meanwhile
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vlm.errors import DataError
from vlm.files import open_whole

__all__ = ["SCRATCH", "begin_writing", "finish_writing", "hold_target", "share_target"]

SCRATCH: Final = ".writing"
_STATE: Final = "writing.json"
_RESULTS: Final = ("manifest.json", "skipped.jsonl")
_PATIENCE_SECONDS: Final = 10.0


@contextmanager
def hold_target(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and keep other writers out of it.

    What is left without a description is removed, the folder too if it was made here.

    Raises:
        DataError: If it holds shards that no interrupted writing explains, or another process
            writes into it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Workers of a killed writer may live for a moment, and still rename a shard.
    with _locked(folder, fcntl.LOCK_EX, _PATIENCE_SECONDS) as descriptor:
        if not (folder / _STATE).is_file() and any(folder.glob("*.tar")):
            message = f"{folder}: already holds shards; choose an empty folder"
            raise DataError(message)
        _remove_drafts(folder)
        _lock(folder, descriptor, fcntl.LOCK_SH)  # from now on its workers share it
        try:
            yield
        finally:
            _remove_drafts(folder)
            if not (folder / _STATE).is_file():
                shutil.rmtree(folder / SCRATCH, ignore_errors=True)
                if made:
                    with contextlib.suppress(OSError):  # not empty
                        folder.rmdir()


@contextmanager
def share_target(folder: Path) -> Iterator[None]:
    """In a worker, around one shard: no other writer can have the folder meanwhile.

    Raises:
        DataError: If one has.
    """
    with _locked(folder, fcntl.LOCK_SH, 0.0):
        yield


def begin_writing(folder: Path, description: dict[str, Any], shards: set[str]) -> None:
    """Describe what is going to be written, or see that an interrupted writing was the same.

    Args:
        folder: Held by `hold_target`.
        description: Plain JSON.
        shards: Names of all shards that there may be.

    Raises:
        DataError: If the folder holds shards of another description, or others.
    """
    (folder / SCRATCH).mkdir(exist_ok=True)
    path = folder / _STATE
    if not path.is_file():
        for name in _RESULTS:
            (folder / name).unlink(missing_ok=True)
        with open_whole(path) as file:
            file.write(json.dumps(description, indent=1, sort_keys=True).encode() + b"\n")
        return
    start_anew = f"give what it was begun with, or remove {folder} to start anew"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{path}: cannot be read ({error}); remove {folder} to start anew"
        raise DataError(message) from error
    differences = list(_differences(found, json.loads(json.dumps(description))))
    if differences and not _has_begun(folder):
        path.unlink()  # nothing was written under it, as after a bad first row
        begin_writing(folder, description, shards)
        return
    if differences:
        message = (
            f"{folder}: holds part of another set of shards: {'; '.join(differences)}. To go on, "
            f"{start_anew}"
        )
        raise DataError(message)
    strange = sorted({shard.name for shard in folder.glob("*.tar")} - shards)
    if strange:
        message = f"{folder / strange[0]}: is not of this set of shards; move it elsewhere"
        raise DataError(message)


def _has_begun(folder: Path) -> bool:
    """Whether a shard, or the list of bad samples of one, is there."""
    return any(folder.glob("*.tar")) or any((folder / SCRATCH).glob("*.jsonl"))


def finish_writing(folder: Path) -> None:
    """Remove what was there for the sake of writing; the folder is complete."""
    shutil.rmtree(folder / SCRATCH)
    (folder / _STATE).unlink()


def _differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from _differences(then.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif then != now:
        yield f"{name} was {then!r} and is {now!r}"


def _remove_drafts(folder: Path) -> None:
    for suffix in ("tar", "npy", "json", "jsonl"):
        for draft in folder.glob(f".*.{suffix}.draft"):
            draft.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path, kind: int, patience_seconds: float) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + patience_seconds
        _lock(folder, descriptor, kind, until=end)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int, kind: int, *, until: float = 0.0) -> None:
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            message = f"{folder}: another process writes into it; wait for it, or end it"
            raise DataError(message) from error
        except OSError:
            return  # a file system that knows no locks: two writers at once are the user's care
        else:
            return
