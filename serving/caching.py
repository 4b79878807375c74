"""Rows that were computed before: least recently used, bounded in bytes, safe between threads."""

import threading
from collections import OrderedDict
from typing import Final, Literal

import numpy as np

from serving.metrics import Metrics

__all__ = ["RowCache"]

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


def _size(key: str, row: np.ndarray) -> int:
    return row.nbytes + 4 * len(key) + _OVERHEAD_BYTES
