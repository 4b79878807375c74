"""What a store of vectors must do. It knows ids, unit vectors and payloads, not models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

__all__ = ["Hit", "Item", "Store"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """What is stored under one id."""

    id: str
    vector: np.ndarray
    """A unit row, float32 [dim]."""
    text: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    """Plain JSON."""
    thumbnail: bytes | None = None
    """A small WebP."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One result of a search."""

    id: str
    score: float
    """Cosine similarity, -1 to 1."""
    text: str | None
    metadata: dict[str, Any]
    has_thumbnail: bool


class Store(Protocol):
    """A collection of one model's vectors. Methods block; call them off the event loop.

    What `upsert` and `delete` acknowledge is on disk and seen by every later search.
    """

    @property
    def fingerprint(self) -> str:
        """Of the model whose vectors these are."""
        ...

    def upsert(self, items: Sequence[Item]) -> None:
        """Insert items, replacing those of the same id; all of them or none."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Remove items; returns how many there were."""
        ...

    def get(self, item_id: str) -> Item | None: ...

    def existing(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that are stored."""
        ...

    def search(self, vector: np.ndarray, limit: int, where: Mapping[str, Any]) -> list[Hit]:
        """The nearest items, best first, equal scores by id.

        Args:
            vector: A unit row, float32 [dim].
            limit: Most hits.
            where: Metadata values that a hit must have, by key.
        """
        ...

    def count(self) -> int: ...

    def optimize(self) -> None:
        """Merge what many small writes left behind."""
        ...
