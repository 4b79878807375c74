"""What collections there are, and the names that stand for them."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Final, Protocol

from serving.errors import BadInputError
from serving.stores.base import CollectionInfo, Store

__all__ = [
    "DEFAULT",
    "Catalog",
    "Known",
    "check_collection_name",
    "is_collection_name",
    "only_one",
    "replace_whole",
]

DEFAULT: Final = "default"
"""The collection of requests that name none."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


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


def is_collection_name(text: str) -> bool:
    """Whether a collection or an alias may be called so."""
    return _NAME.fullmatch(text) is not None


def check_collection_name(text: str) -> None:
    """Raise BadInputError where `is_collection_name` says no."""
    if not is_collection_name(text):
        message = f"{text[:64]!r}: a name is 1 to 64 letters, digits, dashes and underscores"
        raise BadInputError(message)


def replace_whole(path: Path, text: str) -> None:
    """Write UTF-8 text so that readers see what was there before, or all of this."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


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
