"""A bounded folder of fetched bytes, shared by all processes of a machine.

Each entry is one file: the bytes, then 16 bytes of their BLAKE2b. A file appears whole under its
final name and is verified when a process first opens it; a damaged one is removed and fetched
again. The total is counted under a file lock, and the entries used longest ago make room.
"""

import fcntl
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Final

__all__ = ["ByteCache", "locked"]

_DIGEST: Final = 16
_MAX_OPEN: Final = 256
_KEPT_SHARE: Final = 0.9
"""Of the bound, after an eviction, so that not every write evicts."""


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the exclusive lock of a file across processes; yields its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


class ByteCache:
    """Bytes by name.

    Args:
        folder: Made if it is missing; nothing else may lie in it.
        max_bytes: Of all entries together; an entry over it is not kept.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._open: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._verified: dict[str, int] = {}
        self._lock = Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        """`size` bytes at `offset` of an entry, or none if there is no such entry."""
        with self._lock:
            entry = self._entry(name)
            if entry is None or offset + size > entry[1]:
                return None
            return os.pread(entry[0], size, offset)

    def __contains__(self, name: str) -> bool:
        return (self._folder / name).exists()

    def write(self, name: str, data: bytes) -> None:
        """Keep an entry, making room for it."""
        size = len(data) + _DIGEST
        if size > self._max_bytes:
            return
        draft = self._folder / f".{name}.{os.getpid()}.draft"
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.write(hashlib.blake2b(data, digest_size=_DIGEST).digest())
            with locked(self._folder / ".lock") as counter:
                path = self._folder / name
                replaced = path.stat().st_size if path.exists() else 0
                total = _counted(counter, self._folder) + size - replaced
                draft.replace(path)
                if total > self._max_bytes:
                    total = self._evict(keep=name)
                os.pwrite(counter, total.to_bytes(8, "little"), 0)
        finally:
            draft.unlink(missing_ok=True)
            with self._lock:
                stale = self._open.pop(name, None)
                if stale is not None:
                    os.close(stale[0])

    def close(self) -> None:
        """Close all entries."""
        with self._lock:
            for descriptor, _ in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _entry(self, name: str) -> tuple[int, int] | None:
        """Descriptor and size of a verified entry."""
        found = self._open.get(name)
        if found is not None:
            self._open.move_to_end(name)
            return found
        path = self._folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        status = os.fstat(descriptor)
        size = status.st_size - _DIGEST
        if self._verified.get(name) != status.st_ino:
            if not _is_whole(descriptor, size):
                os.close(descriptor)
                path.unlink(missing_ok=True)
                return None
            self._verified[name] = status.st_ino
        os.utime(descriptor)  # used now: goes last
        self._open[name] = descriptor, size
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1][0])
        return descriptor, size

    def _evict(self, *, keep: str) -> int:
        """Remove what was used longest ago; the bytes that remain."""
        entries = sorted(_entries(self._folder))
        total = sum(size for _, size, _ in entries)
        for _, size, name in entries:
            if total <= self._max_bytes * _KEPT_SHARE:
                break
            if name != keep:
                (self._folder / name).unlink(missing_ok=True)
                total -= size
        return total


def _is_whole(descriptor: int, size: int) -> bool:
    if size < 0:
        return False
    data = os.pread(descriptor, size + _DIGEST, 0)
    return hashlib.blake2b(data[:size], digest_size=_DIGEST).digest() == data[size:]


def _entries(folder: Path) -> Iterator[tuple[int, int, str]]:
    """Time of use in nanoseconds, size and name of every entry."""
    with os.scandir(folder) as listing:
        for item in listing:
            try:
                if not item.name.startswith("."):
                    status = item.stat()
                    yield status.st_mtime_ns, status.st_size, item.name
            except FileNotFoundError:
                continue  # another process found it damaged


def _counted(counter: int, folder: Path) -> int:
    """Bytes of all entries, as the last writer left it; counted anew where nobody did."""
    known = os.pread(counter, 8, 0)
    if len(known) == 8:
        return int.from_bytes(known, "little")
    return sum(size for _, size, _ in _entries(folder))
