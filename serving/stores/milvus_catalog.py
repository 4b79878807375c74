"""Collections of a Milvus cluster, where all that is known of them is kept too.

A collection's name there is PREFIXitems_NAME, an alias's PREFIXalias_NAME; what is noted beside it
is one of its properties. So any number of servers share them without a folder.
"""

import hashlib
import tempfile
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

from serving.stores.catalog import Known, only_one
from serving.stores.milvus import MilvusStore
from serving.stores.milvus_cluster import MilvusCluster, info_of

__all__ = ["MilvusCatalog"]

_NOTE: Final = "vlm.note"
_REMEMBER_SECONDS: Final = 0.5


class MilvusCatalog:
    """A `Catalog` in a cluster, shared by threads.

    Args:
        cluster: Where it is.
        prefix: What the names of all collections begin with.
    """

    def __init__(self, cluster: MilvusCluster, *, prefix: str) -> None:
        self._cluster = cluster
        self._prefix = prefix
        self._found: dict[str, tuple[float, Known | None]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        ours = self._items("")
        every = self._cluster.call("list_collections")
        return sorted(_readable(name.removeprefix(ours)) for name in every if name.startswith(ours))

    def aliases(self) -> dict[str, str]:
        ours = self._alias("")
        return {
            _readable(alias.removeprefix(ours)): name
            for name in self.names()
            for alias in self._described(self._items(name)).get("aliases", ())
            if alias.startswith(ours)
        }

    def find(self, asked: str) -> Known | None:
        with self._lock:
            at, known = self._found.get(asked, (0.0, None))
        if at + _REMEMBER_SECONDS > time.monotonic():
            return known
        known = self._look(asked)
        with self._lock:
            self._found[asked] = (time.monotonic(), known)
        return known

    def open(self, name: str, *, fingerprint: str, dim: int) -> MilvusStore:
        store = MilvusStore(self._cluster, self._items(name), fingerprint=fingerprint, dim=dim)
        self._forget()
        return store

    def drop(self, name: str) -> None:
        self._cluster.call("drop_collection", self._items(name))
        self._forget()

    def point(self, alias: str, name: str) -> None:
        known = self._cluster.call("has_collection", self._alias(alias))
        if alias == name:
            if known:
                self._cluster.call("drop_alias", self._alias(alias))
        else:
            method = "alter_alias" if known else "create_alias"
            self._cluster.call(method, self._items(name), self._alias(alias))
        self._forget()

    def note(self, name: str, text: str) -> None:
        properties = {_NOTE: text}
        self._cluster.call("alter_collection_properties", self._items(name), properties)
        self._forget()

    def alone(self, name: str) -> AbstractContextManager[bool]:
        place = f"{self._cluster.options.uri} {self._cluster.options.database} {self._items(name)}"
        digest = hashlib.sha256(place.encode()).hexdigest()[:32]
        return only_one(Path(tempfile.gettempdir()) / f"vlm-{digest}.measuring")

    def describe(self, name: str) -> str:
        return f"{self._items(name)} at {self._cluster.options.uri}"

    def _look(self, asked: str) -> Known | None:
        for name in (self._alias(asked), self._items(asked)):
            if self._cluster.call("has_collection", name):
                described = self._described(name)
                info = info_of(described)
                if info is None:
                    return None
                return Known(
                    name=_readable(described["collection_name"].removeprefix(self._items(""))),
                    info=info,
                    note=described.get("properties", {}).get(_NOTE),
                )
        return None

    def _described(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._cluster.call("describe_collection", name)
        return found

    def _forget(self) -> None:
        with self._lock:
            self._found.clear()

    def _items(self, name: str) -> str:
        return f"{self._prefix}items_{_plain(name)}"

    def _alias(self, name: str) -> str:
        return f"{self._prefix}alias_{_plain(name)}"


def _plain(name: str) -> str:
    """A name in the letters that Milvus allows: no dash."""
    return name.replace("_", "_u").replace("-", "_d")


def _readable(plain: str) -> str:
    return plain.replace("_d", "-").replace("_u", "_")
