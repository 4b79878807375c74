"""Collections of the embedded store, each in a folder.

    INDEX/                           the collection `default`
    INDEX-collections/NAME/          every other one
    INDEX-collections/aliases.json   names that stand for a collection; `default` may be one

The file of aliases is replaced as a whole: a switch is seen by the next request, and those that
have begun end with the collection they began with.
"""

import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from serving.errors import ConflictError, NotFoundError
from serving.stores.catalog import (
    DEFAULT,
    Known,
    check_collection_name,
    is_collection_name,
    kept_in_place,
    only_one,
    replace_whole,
)
from serving.stores.collection_info import holds_collection, made, read_collection_info
from serving.stores.embedded import EmbeddedStore

__all__ = ["FolderCatalog"]

_ALIASES: Final = "aliases.json"
_NOTE: Final = "recall.json"
_LOCK: Final = ".measuring"


class FolderCatalog:
    """A `Catalog` of folders.

    Args:
        index: The default collection.
        collections: Where all others are; none: `INDEX-collections`, beside it.
    """

    def __init__(self, index: Path, collections: Path | None = None) -> None:
        self._index = index
        self._root = collections or index.with_name(f"{index.name}-collections")

    def names(self) -> list[str]:
        folders = self._root.iterdir() if self._root.is_dir() else ()
        found = [
            path.name
            for path in folders
            if is_collection_name(path.name) and holds_collection(path)
        ]
        if holds_collection(self._index):
            found.append(DEFAULT)
        return sorted(found)

    def aliases(self) -> dict[str, str]:
        try:
            text = (self._root / _ALIASES).read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        found: dict[str, str] = json.loads(text)
        return found

    def find(self, asked: str) -> Known | None:
        name = self.aliases().get(asked, asked)
        if not is_collection_name(name):
            return None
        making = made(self._folder(name))
        info = read_collection_info(self._folder(name))
        if info is None:
            return None
        try:
            note = (self._folder(name) / _NOTE).read_text(encoding="utf-8")
        except FileNotFoundError:
            note = None
        return Known(name=name, info=info, note=note, made=making)

    def open(self, name: str, *, fingerprint: str, dim: int) -> EmbeddedStore:
        check_collection_name(name)
        try:
            return EmbeddedStore(self._folder(name), fingerprint=fingerprint, dim=dim)
        except (FileExistsError, FileNotFoundError, NotFoundError) as error:
            message = f"collection {name!r} was removed while it was opened; try again"
            raise ConflictError(message) from error

    def drop(self, name: str) -> None:
        # The name is gone at once, what lay there afterwards, as what was left by one that was
        # killed then.
        folder = self._folder(name)
        grave = folder.with_name(f".{folder.name}.{os.getpid()}.removed")
        shutil.rmtree(grave, ignore_errors=True)
        try:
            with kept_in_place(folder, alone=True):
                folder.replace(grave)
        except FileNotFoundError as error:
            raise _gone(name) from error
        for left in folder.parent.glob(f".{folder.name}.*removed"):
            shutil.rmtree(left, ignore_errors=True)

    def point(self, alias: str, name: str) -> None:
        changed = {**self.aliases(), alias: name}
        if alias == name:
            changed.pop(alias, None)
        self._root.mkdir(parents=True, exist_ok=True)
        replace_whole(self._root / _ALIASES, json.dumps(dict(sorted(changed.items())), indent=1))

    def note(self, name: str, text: str) -> None:
        try:
            replace_whole(self._folder(name) / _NOTE, text)
        except FileNotFoundError as error:
            raise _gone(name) from error

    def alone(self, name: str) -> AbstractContextManager[bool]:
        return only_one(self._folder(name) / _LOCK)

    def describe(self, name: str) -> str:
        return str(self._folder(name))

    def _folder(self, name: str) -> Path:
        return self._index if name == DEFAULT else self._root / name


def _gone(name: str) -> NotFoundError:
    return NotFoundError(f"collection {name!r} is not there any more")
