"""What collections there are, and the names that stand for them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Final, Protocol

from serving.stores.base import CollectionInfo, Store

__all__ = ["DEFAULT", "Catalog", "Known", "only_one"]

DEFAULT: Final = "default"
"""The collection of requests that name none."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a collection that is not open."""

    name: str
    info: CollectionInfo
    note: str | None
    """What was noted beside it last; None: nothing."""


class Catalog(Protocol):
    """Collections by name. Methods block; call them off the event loop.

    What one process changes is seen by the others within a second, and by itself at once.
    """

    def names(self) -> list[str]:
        """All collections, without aliases."""
        ...

    def aliases(self) -> dict[str, str]:
        """By alias the collection that it stands for."""
        ...

    def find(self, asked: str) -> Known | None:
        """The collection of a name, or that an alias stands for; None if there is none."""
        ...

    def open(self, name: str, *, fingerprint: str, dim: int) -> Store:
        """A collection, made if it is missing.

        Raises:
            FingerprintError: If it holds another model's vectors.
        """
        ...

    def drop(self, name: str) -> None:
        """Remove a collection with all that is in it."""
        ...

    def point(self, alias: str, name: str) -> None:
        """Make a name stand for a collection; its own name takes the alias away."""
        ...

    def note(self, name: str, text: str) -> None:
        """Keep a text beside a collection; readers see the old one or the new one, whole."""
        ...

    def alone(self, name: str) -> AbstractContextManager[bool]:
        """Whether no other process of this machine is looking after the collection now."""
        ...

    def describe(self, name: str) -> str:
        """Where a collection is, for a person."""
        ...


@contextmanager
def only_one(path: Path) -> Iterator[bool]:
    """Whether nobody else, in whichever process, holds the lock of a file now."""
    with path.open("w") as file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
