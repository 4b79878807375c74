"""Items that tests of stores write."""

from collections.abc import Callable
from pathlib import Path

from serving.stores import EmbeddedStore, Item, Store
from tests.support import unit_rows

__all__ = ["DIM", "FINGERPRINT", "OpenStore", "items", "open_embedded"]

DIM = 8
FINGERPRINT = "f" * 64
OpenStore = Callable[[Path], Store]
"""Opens the store that belongs to a folder; of the same folder it is the same."""


def open_embedded(folder: Path) -> EmbeddedStore:
    return EmbeddedStore(folder, fingerprint=FINGERPRINT, dim=DIM)


def items(count: int, *, start: int = 0) -> list[Item]:
    rows = unit_rows(start + count, DIM).float().numpy()[start:]
    return [
        Item(
            id=f"i{start + n:04d}",
            vector=row,
            text=f"thing {start + n}",
            metadata={"parity": "even" if (start + n) % 2 == 0 else "odd", "n": start + n},
            thumbnail=b"webp" if n % 3 == 0 else None,
        )
        for n, row in enumerate(rows)
    ]
