"""What a store of vectors must do. It knows ids, unit vectors and payloads, not models."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from serving.stores.filters import Filter, Modality

__all__ = [
    "CollectionInfo",
    "Effort",
    "Hit",
    "Item",
    "Snapshots",
    "Store",
    "Versioned",
    "best_first",
]


@dataclass(frozen=True, kw_only=True)
class CollectionInfo:
    """Whose vectors a collection holds."""

    fingerprint: str
    dim: int


@dataclass(frozen=True, kw_only=True)
class Item:
    """What is stored under one id."""

    id: str
    vector: np.ndarray
    """A unit row, float32 [dim]."""
    modality: Modality = "image"
    """What the vector is of."""
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
    """Cosine similarity, -1 to 1; of a search in captions BM25, which has no upper bound."""
    text: str | None
    metadata: dict[str, Any]
    has_thumbnail: bool
    modality: Modality = "image"
    vector: np.ndarray | None = None
    """The unit row, float32 [dim], where it was asked for."""


@dataclass(frozen=True, order=True)
class Effort:
    """How hard an index is searched; more finds more, and takes longer."""

    probes: int
    """Parts of the index that are looked into."""
    refine: int
    """Candidates for each hit whose exact similarity is computed."""


class Store(Protocol):
    """A collection of one model's vectors. Methods block; call them off the event loop.

    What `upsert` and `delete` acknowledge is on disk and seen by every later read, of other
    processes too: at once, or in a cluster a moment later.
    """

    @property
    def fingerprint(self) -> str:
        """Of the model whose vectors these are."""
        ...

    @property
    def dim(self) -> int: ...

    @property
    def made(self) -> object:
        """Another one for a collection of the same name that was made after this was removed.

        Of a collection that was removed, methods raise NotFoundError. None: the store looks its
        collection up by name each time.
        """
        ...

    def upsert(self, items: Sequence[Item]) -> None:
        """Insert items, replacing those of the same id; all of them or none."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Remove items; returns how many there were."""
        ...

    def delete_where(self, where: Filter) -> int:
        """Remove the items that fulfil a filter, all at once; returns how many there were."""
        ...

    def get(self, item_id: str) -> Item | None: ...

    def existing(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that are stored."""
        ...

    def search(
        self,
        vector: np.ndarray,
        limit: int,
        where: Filter = (),
        *,
        effort: Effort | None = None,
        vectors: bool = False,
    ) -> list[Hit]:
        """The nearest items, best first, equal scores by id.

        Args:
            vector: A row, float32 [dim].
            limit: Most hits.
            where: What every hit must fulfil.
            effort: How hard the index is searched; None: exactly, without it.
            vectors: Whether hits bring their vectors.
        """
        ...

    def search_captions(self, words: str, limit: int, where: Filter = ()) -> list[Hit]:
        """Items whose text holds some of the words, best first, equal scores by id."""
        ...

    def count(self, where: Filter = ()) -> int: ...

    def scan(self, limit: int, *, after: str = "", where: Filter = ()) -> list[Item]:
        """Items in the order of their ids (by code point), those behind `after`.

        Page by page from the last id, everything that stays is seen once, whatever is written
        meanwhile.
        """
        ...

    def sample(self, count: int, *, seed: int = 0) -> list[Item]:
        """Items drawn evenly, without one twice; all of them if there are no more."""
        ...

    @property
    def efforts(self) -> Sequence[Sequence[Effort]]:
        """What may be worth trying: groups of rising probes, within each of rising refinement."""
        ...

    @property
    def is_indexed(self) -> bool:
        """Whether there is an index that an effort applies to."""
        ...

    def build_index(self) -> None:
        """Make, or make anew, the index of vectors; searches and writes go on meanwhile."""
        ...

    def optimize(self) -> None:
        """Merge what many small writes left behind, and take new items into the index."""
        ...


@runtime_checkable
class Versioned(Protocol):
    """A store that can say cheaply whether it has changed."""

    @property
    def version(self) -> int:
        """Another number after each change, whichever process made it."""
        ...


class Snapshots(Protocol):
    """States of a store that are kept under names, where the store can."""

    def snapshot(self, name: str) -> None:
        """Keep the state of now; a name that is taken is given to it."""
        ...

    def snapshots(self) -> list[str]: ...

    def restore(self, name: str) -> None:
        """Make a kept state the state of now; NotFoundError if there is none of that name."""
        ...

    def drop_snapshot(self, name: str) -> None:
        """Let a kept state go; NotFoundError if there is none of that name."""
        ...


def best_first(hit: Hit) -> tuple[float, str]:
    """The key by which hits are sorted."""
    return -hit.score, hit.id
