"""What was computed or read before: least recently used, bounded in bytes, safe between threads."""

import os
import threading
from collections import OrderedDict
from typing import Final, Generic, Literal, TypeVar

import numpy as np

from serving.metrics import Metrics

__all__ = ["FileCache", "RowCache"]

ValueT = TypeVar("ValueT")
Kind = Literal["text", "image"]
_OVERHEAD_BYTES: Final = 300
"""Of an entry beside its row: the key, the array's head, the links."""


class RowCache:
    """Rows by key, of all models together; keys hold the fingerprint.

    Args:
        max_bytes: Of all entries; 0 keeps nothing.
        metrics: Where hits, misses and the size are told.
    """

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._lookups = {
            (kind, found): metrics.cache.labels(kind, "hit" if found else "miss")
            for kind in ("text", "image")
            for found in (True, False)
        }
        self._rows: OrderedDict[tuple[str, str, str], np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        return self._max_bytes > 0

    def get(self, model: str, kind: Kind, key: str) -> np.ndarray | None:
        """The row of a text or an image, if it is remembered.

        Args:
            model: Fingerprint and runtime.
            kind: Of what it is the row.
            key: The text, or the hash of the file.
        """
        with self._lock:
            row = self._rows.get((model, kind, key))
            if row is not None:
                self._rows.move_to_end((model, kind, key))
        self._lookups[kind, row is not None].inc()
        return row

    def put(self, model: str, kind: Kind, key: str, row: np.ndarray) -> None:
        """Remember a row, which must not be changed afterwards, and forget what was used least."""
        if _size(key, row) > self._max_bytes:
            return
        kept = row.copy()  # a view would hold the whole batch
        kept.flags.writeable = False
        with self._lock:
            old = self._rows.pop((model, kind, key), None)
            self._bytes += _size(key, kept) - (0 if old is None else _size(key, old))
            self._rows[model, kind, key] = kept
            while self._bytes > self._max_bytes:
                (_, _, oldest), forgotten = self._rows.popitem(last=False)
                self._bytes -= _size(oldest, forgotten)
            self._metrics.cache_bytes.set(self._bytes)


class FileCache(Generic[ValueT]):
    """What was made of files, by name, as long as they are the same.

    Args:
        max_bytes: Of the files; one that is larger is kept alone, as long as nothing else is asked
            for: to read it again for each request would cost more.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, tuple[os.stat_result, ValueT]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, name: str, file: os.stat_result) -> ValueT | None:
        """What is kept of a name, if it was made of this file."""
        with self._lock:
            kept = self._kept.get(name)
            if kept is None or _identity(kept[0]) != _identity(file):
                return None
            self._kept.move_to_end(name)
            return kept[1]

    def put(self, name: str, file: os.stat_result, value: ValueT) -> None:
        """Keep what was made of a file, and forget what was used least."""
        with self._lock:
            self._forget(name)
            self._kept[name] = (file, value)
            self._bytes += file.st_size
            while self._bytes > self._max_bytes and len(self._kept) > 1:
                self._forget(next(iter(self._kept)))

    def forget(self, name: str) -> None:
        """Let go of a name; nothing happens if it is not kept."""
        with self._lock:
            self._forget(name)

    def _forget(self, name: str) -> None:
        kept = self._kept.pop(name, None)
        self._bytes -= 0 if kept is None else kept[0].st_size


def _identity(file: os.stat_result) -> tuple[int, int, int]:
    """A file that is renamed over another within one tick of the clock is another still."""
    return file.st_mtime_ns, file.st_size, file.st_ino


def _size(key: str, row: np.ndarray) -> int:
    return row.nbytes + 4 * len(key) + _OVERHEAD_BYTES
