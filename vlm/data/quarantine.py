"""Samples that cannot be used: written down, replaced, and no more of them than is allowed."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

import numpy as np

from vlm.errors import DataError

__all__ = ["Quarantine", "replacements"]

_FEWEST_SEEN = 1000
_MOST_TRIES = 1000


def replacements(row: int, *, num_samples: int, seed: int) -> Iterator[int]:
    """Rows to try in place of a bad one, in order.

    They depend on the row and the seed alone, so every world size and every resume of a run takes
    the same.
    """
    for attempt in range(_MOST_TRIES):
        generator = np.random.Generator(np.random.Philox(key=[seed, row], counter=attempt))
        yield int(generator.integers(num_samples))


class Quarantine:
    """The ledger of one run: a JSON object a line, with shard, key, reason and time of discovery.

    Several ranks may write to one ledger; each appends whole lines.

    Args:
        ledger: The file, or none to keep it in memory only.
        num_samples: Of the dataset.
        max_bad_fraction: Of the samples seen by this rank (counted as 1,000 until there are so
            many, or as the dataset if that is smaller); in [0, 1).
    """

    def __init__(self, ledger: Path | None, *, num_samples: int, max_bad_fraction: float) -> None:
        self._ledger = ledger
        self._num_samples = num_samples
        self._max_bad_fraction = max_bad_fraction
        self._rows: set[tuple[int, int]] = set()
        self._seen = 0
        self._lock = Lock()
        self._written = _read_ledger(ledger)

    def __len__(self) -> int:
        """Bad samples that this rank met since it started."""
        return len(self._rows)

    def __contains__(self, visit: tuple[int, int]) -> bool:
        """Whether a row of a source, by its number, is known to be bad."""
        return visit in self._rows

    def count_seen(self) -> None:
        """One more sample was read, good or bad."""
        with self._lock:
            self._seen += 1

    def add(self, visit: tuple[int, int], *, shard: str, key: str, error: DataError) -> None:
        """Write down one bad sample.

        Raises:
            DataError: If there are now more than allowed.
        """
        with self._lock:
            self._rows.add(visit)
            if (shard, key) not in self._written:
                self._written.add((shard, key))
                self._append({"shard": shard, "key": key, "reason": str(error)})
            bad = len(self._rows)
            seen = min(self._num_samples, max(self._seen, _FEWEST_SEEN))
        if bad > self._max_bad_fraction * seen:
            where = "" if self._ledger is None else f" All are in {self._ledger}."
            message = (
                f"{error}. It is bad sample number {bad}, over "
                f"data.stream.max_bad_fraction={self._max_bad_fraction:g} of {seen}.{where} "
                f"Run `vlm data check FOLDER --repair` on the shards, or raise max_bad_fraction"
            )
            raise DataError(message) from error

    def _append(self, entry: dict[str, str]) -> None:
        if self._ledger is None:
            return
        line = json.dumps({**entry, "first_seen": datetime.now(UTC).isoformat(timespec="seconds")})
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self._ledger, flags, 0o644)
        try:
            # One write of one line: appends of several ranks do not mix.
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)


def _read_ledger(path: Path | None) -> set[tuple[str, str]]:
    """What an interrupted run wrote down already; a torn last line is left out."""
    written = set()
    if path is not None and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                written.add((str(entry["shard"]), str(entry["key"])))
            except (ValueError, KeyError, TypeError):
                continue
    return written
