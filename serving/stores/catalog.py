"""What collections there are, and the names that stand for them."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import IO, Final, Protocol

from serving.errors import BadInputError, ConflictError
from serving.stores.base import CollectionInfo, Store

__all__ = [
    "DEFAULT",
    "Catalog",
    "Known",
    "check_collection_name",
    "is_collection_name",
    "kept_in_place",
    "only_one",
    "replace_whole",
]

DEFAULT: Final = "default"
"""The collection of requests that name none."""
_LOCK: Final = ".changing"
_PATIENCE_SECONDS: Final = 5.0
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a collection that is not open."""

    name: str
    info: CollectionInfo
    note: str | None
    """What was noted beside it last; None: nothing."""
    made: object = None
    """As of a `Store`."""


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
            ConflictError: If another process removes it at this moment.
        """
        ...

    def drop(self, name: str) -> None:
        """Remove a collection with all that is in it.

        Raises:
            NotFoundError: If there is none.
            ConflictError: If it is written to for longer than one can wait.
        """
        ...

    def point(self, alias: str, name: str) -> None:
        """Make a name stand for a collection; its own name takes the alias away."""
        ...

    def note(self, name: str, text: str) -> None:
        """Keep a text beside a collection; readers see the old one or the new one, whole.

        NotFoundError if there is no such collection.
        """
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
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


@contextmanager
def only_one(path: Path) -> Iterator[bool]:
    """Whether nobody else, in whichever process, holds the lock of a file now.

    Of a folder that is gone, nobody is told to.
    """
    try:
        file = path.open("w")
    except FileNotFoundError:
        yield False
        return
    with file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def kept_in_place(folder: Path, *, alone: bool = False) -> Iterator[None]:
    """Keep a folder where it is, against every thread and process that asks for the same.

    Args:
        folder: Of a collection.
        alone: To make or to remove it; if not, to write into it, as others may meanwhile.

    Raises:
        FileNotFoundError: If it is gone.
        ConflictError: If others are not done with it in a few seconds.
    """
    with (folder / _LOCK).open("a") as file:
        _wait_for(file, LOCK_EX if alone else LOCK_SH)
        yield


def _wait_for(file: IO[str], kind: int) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            flock(file, kind | LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                message = "the collection is being written to, or removed; try again in a moment"
                raise ConflictError(message) from None
            time.sleep(0.01)
        else:
            return
