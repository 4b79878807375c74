"""Named collections of items, each of one model, and the aliases that point to them.

    INDEX/                      the collection `default`
    INDEX-collections/NAME/     every other one
    INDEX-collections/aliases.json   names that stand for a collection; `default` may be one

A name is looked up anew for each request, and the file of aliases is replaced as a whole: a switch
is seen by the next request, and those that have begun end with the collection they began with.
"""

import asyncio
import logging
import re
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from serving.errors import BadInputError, ConflictError, NotFoundError
from serving.metrics import Metrics
from serving.services.aliases import DEFAULT, read_aliases, write_aliases
from serving.services.embedding import Embedder
from serving.services.recall import (
    HELD_OUT,
    Measurement,
    held_out_queries,
    is_out_of_date,
    load_measurement,
    measured_at,
    only_one,
    save_measurement,
    tune,
)
from serving.services.registry import Registry
from serving.services.retrieval import Retriever
from serving.services.searching import Tuning
from serving.settings import ServingSettings
from serving.stores import EmbeddedStore, Store, read_collection_info

__all__ = ["Collection", "Collections"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Items of one model, open."""

    name: str
    folder: Path
    store: Store
    embedder: Embedder
    retriever: Retriever
    tuning: Tuning

    @property
    def measurement(self) -> Measurement | None:
        """What was measured of it last."""
        return self.tuning.measurement


class Collections:
    """Collections by name. Used from the event loop alone.

    Args:
        settings: Where they lie, and what their searches must find.
        registry: The models that are served.
        metrics: Where sizes and recall are told.
    """

    def __init__(self, settings: ServingSettings, registry: Registry, metrics: Metrics) -> None:
        self._settings = settings
        self._registry = registry
        self._metrics = metrics
        self._root = settings.collections_folder
        self._open: dict[str, Collection] = {}
        self._last: dict[str, Collection] = {}
        self._changes = asyncio.Lock()
        self._tuning = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Open the default collection, made for the default model if there is none.

        Raises:
            FingerprintError: If it holds another model's vectors.
            ConflictError: If it is an alias, and no served model has its fingerprint.
        """
        name = self._resolved(DEFAULT)
        if name == DEFAULT:
            embedder = self._registry.default.embedder
            self._open[name] = await asyncio.to_thread(self._opened, name, embedder)
        collection = await self.get()
        self._consider(collection)

    async def close(self) -> None:
        """Wait for what is being measured."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def of_model(self, fingerprint: str) -> list[str]:
        """Open collections that hold a model's vectors, by name."""
        return sorted(
            c.name for c in self._open.values() if c.embedder.info.fingerprint == fingerprint
        )

    def names(self) -> list[str]:
        """All collections, the default one first."""
        found = {p.name for p in self._folders()}
        if read_collection_info(self._settings.index) is not None:
            found.add(DEFAULT)
        return sorted(found, key=lambda name: (name != DEFAULT, name))

    def aliases(self) -> dict[str, str]:
        """What names stand for collections."""
        return read_aliases(self._root)

    async def get(self, name: str | None = None) -> Collection:
        """The collection of a name or alias; the default one for none.

        Raises:
            NotFoundError: If there is none; the message lists those that there are.
            ConflictError: If no model that is served made its vectors.
        """
        asked = name or DEFAULT
        target = self._resolved(asked)
        self._look_again(target)
        if target not in self._open:
            try:
                await self._open_known(target, asked)
            except ConflictError as error:
                # An alias was switched before its model is served: the old one goes on answering.
                if asked not in self._last:
                    raise
                _log.warning(
                    "an alias points to a collection that cannot be searched yet",
                    extra={"alias": asked, "collection": target, "reason": str(error)},
                )
                return self._last[asked]
        if self._last.get(asked) is not self._open[target]:
            self._last[asked] = self._open[target]
            self.settle()
            if target not in self._open:  # its model was unloaded while it was being opened
                return await self.get(name)
        return self._open[target]

    def settle(self) -> None:
        """Follow a change of models or names: each open collection goes on with its own model.

        One whose model is served anew takes that; one whose model is gone is closed, and so is one
        that no name leads to, where it alone keeps a model. Models that none needs are let go.
        """
        asked = {collection.name for collection in self._last.values()}
        hidden = set(self.aliases()) - asked
        for name, collection in list(self._open.items()):
            fingerprint = collection.embedder.info.fingerprint
            model = self._registry.find(fingerprint)
            if model is None or (name in hidden and self._registry.is_kept(fingerprint)):
                del self._open[name]
            elif model.embedder is not collection.embedder:
                self._open[name] = self._joined(collection, model.embedder)
        self._last = {a: self._open[c.name] for a, c in self._last.items() if c.name in self._open}
        self._registry.keep_only({c.embedder.info.fingerprint for c in self._open.values()})

    async def create(self, name: str, model: str | None = None) -> Collection:
        """An empty collection for a model; the one there is, if it is that model's.

        Raises:
            BadInputError: If that is no name for a collection.
            ConflictError: If the name is taken, by an alias or for another model.
            NotFoundError: If no such model is served.
        """
        if not _NAME.fullmatch(name):
            message = f"{name[:64]!r}: a name is 1 to 64 letters, digits, dashes and underscores"
            raise BadInputError(message)
        embedder = self._registry.get(model).embedder
        async with self._changes:
            if name in self.aliases():
                message = f"{name!r} is an alias of {self.aliases()[name]!r}"
                raise ConflictError(message)
            known = read_collection_info(self._folder(name))
            if known is not None and known.fingerprint != embedder.info.fingerprint:
                message = (
                    f"collection {name!r} is there already, of model {known.fingerprint[:12]}, and "
                    f"not of {embedder.info.fingerprint[:12]}"
                )
                raise ConflictError(message)
            if name not in self._open:
                self._open[name] = await asyncio.to_thread(self._opened, name, embedder)
            return self._open[name]

    async def drop(self, name: str) -> None:
        """Remove a collection with all that is in it.

        Raises:
            NotFoundError: If there is none.
            ConflictError: If it is the default one, or an alias points to it.
        """
        async with self._changes:
            if name == DEFAULT:
                message = "the default collection stays; remove its items instead"
                raise ConflictError(message)
            for alias, target in self.aliases().items():
                if name in (alias, target):
                    message = f"alias {alias!r} points to {target!r}; point it elsewhere first"
                    raise ConflictError(message)
            self._check_known(name)
            self._open.pop(name, None)
            self._last = {a: c for a, c in self._last.items() if c.name != name}
            self.settle()
            await asyncio.to_thread(_remove, self._folder(name))

    async def point(self, alias: str, name: str) -> None:
        """Make an alias stand for a collection, from the next request on.

        Raises:
            BadInputError: If that is no name.
            NotFoundError: If there is no such collection.
            ConflictError: If the alias is a collection, or the model of `name` is not served.
        """
        if not _NAME.fullmatch(alias):
            message = f"{alias[:64]!r}: a name is 1 to 64 letters, digits, dashes and underscores"
            raise BadInputError(message)
        async with self._changes:
            if alias != DEFAULT and alias in self.names():
                message = f"{alias!r} is a collection, not an alias"
                raise ConflictError(message)
            changed = {**self.aliases(), alias: name}
            if alias == name:
                del changed[alias]
            else:
                self._check_known(name)
                if name not in self._open:
                    await self._open_known(name, name)
            await asyncio.to_thread(write_aliases, self._root, changed)
            self._last.pop(alias, None)
            self.settle()

    async def measure(self, collection: Collection) -> Measurement:
        """Index and measure a collection now.

        Raises:
            BadInputError: If it is empty.
        """
        async with self._tuning:
            sample = await asyncio.to_thread(collection.store.sample, HELD_OUT)
            if not sample:
                message = f"collection {collection.name!r} is empty: there is nothing to measure"
                raise BadInputError(message)
            texts = sorted({item.text for item in sample if item.text})
            rows = dict(zip(texts, await collection.embedder.text_rows(texts), strict=True))
            queries = held_out_queries(sample, lambda some: np.stack([rows[t] for t in some]))
            measurement = await asyncio.to_thread(
                tune,
                collection.store,
                queries,
                target=self._settings.recall_target,
                known=collection.measurement,
            )
            await asyncio.to_thread(save_measurement, collection.folder, measurement)
            collection.tuning.measurement = measurement
            self._tell(collection)
            return measurement

    def _consider(self, collection: Collection) -> None:
        """Measure a collection in the background where it has outgrown what is known of it."""
        if not self._tasks:
            task = asyncio.create_task(self._measure_if_needed(collection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _look_again(self, name: str) -> None:
        """See what another process has made of an open collection: measured, or removed it."""
        collection = self._open.get(name)
        if collection is None:
            return
        if read_collection_info(collection.folder) is None:
            del self._open[name]
            return
        changed = measured_at(collection.folder)
        if changed != collection.tuning.file_changed:
            collection.tuning.file_changed = changed
            collection.tuning.measurement = load_measurement(collection.folder)
            self._tell(collection)

    async def _measure_if_needed(self, collection: Collection) -> None:
        with only_one(collection.folder) as alone:
            if alone:
                await self._measure_alone(collection)

    async def _measure_alone(self, collection: Collection) -> None:
        least = self._settings.exact_below
        outdated = await asyncio.to_thread(
            is_out_of_date, collection.store, collection.measurement, exact_below=least
        )
        items = await asyncio.to_thread(collection.store.count)
        self._metrics.collection_items.labels(collection.name).set(items)
        if outdated:
            await self.measure(collection)

    def _tell(self, collection: Collection) -> None:
        found = collection.measurement
        if found is None:
            return
        for kind, share in found.chosen.recall.items():
            self._metrics.collection_recall.labels(collection.name, kind).set(share)
        if found.index_misses_target:
            _log.warning(
                "the index misses too much at every effort; searches are exact, and slower",
                extra={"collection": collection.name, "target": found.target},
            )

    async def _open_known(self, name: str, asked: str) -> None:
        self._check_known(name, asked)
        info = read_collection_info(self._folder(name))
        assert info is not None
        model = self._registry.find(info.fingerprint)
        if model is not None:
            opened = await asyncio.to_thread(self._opened, name, model.embedder)
            self._open.setdefault(name, opened)
            return
        served = ", ".join(f"{m.name} ({m.info.fingerprint[:12]})" for m in self._registry.served())
        message = (
            f"collection {name!r} holds vectors of model {info.fingerprint[:12]}, which is not "
            f"served; served: {served}. Similarities between models mean nothing: load that model"
        )
        raise ConflictError(message)

    def _opened(self, name: str, embedder: Embedder) -> Collection:
        folder, info = self._folder(name), embedder.info
        store = EmbeddedStore(folder, fingerprint=info.fingerprint, dim=info.dim)
        tuning = Tuning(
            exact_below=self._settings.exact_below,
            file_changed=measured_at(folder),
            measurement=load_measurement(folder),
        )
        collection = Collection(
            name=name,
            folder=folder,
            store=store,
            embedder=embedder,
            retriever=self._retriever(name, store, embedder, tuning),
            tuning=tuning,
        )
        self._tell(collection)
        return collection

    def _joined(self, collection: Collection, embedder: Embedder) -> Collection:
        """The same collection with the same model, served by another instance of it."""
        name, store, tuning = collection.name, collection.store, collection.tuning
        retriever = self._retriever(name, store, embedder, tuning)
        return replace(collection, embedder=embedder, retriever=retriever)

    def _retriever(self, name: str, store: Store, embedder: Embedder, tuning: Tuning) -> Retriever:
        has_written = partial(self._has_written, name)
        return Retriever(embedder, store, tuning=tuning, has_written=has_written)

    def _has_written(self, name: str) -> None:
        collection = self._open.get(name)
        if collection is not None:
            self._consider(collection)

    def _resolved(self, name: str) -> str:
        return self.aliases().get(name, name)

    def _check_known(self, name: str, asked: str | None = None) -> None:
        if name not in self.names():
            known = ", ".join([*self.names(), *self.aliases()]) or "none"
            message = f"no collection is called {(asked or name)[:64]!r}; there are: {known}"
            raise NotFoundError(message)

    def _folder(self, name: str) -> Path:
        return self._settings.index if name == DEFAULT else self._root / name

    def _folders(self) -> list[Path]:
        if not self._root.is_dir():
            return []
        return [
            path
            for path in self._root.iterdir()
            if _NAME.fullmatch(path.name) and read_collection_info(path) is not None
        ]


def _remove(folder: Path) -> None:
    """The name is gone at once, what lay there afterwards."""
    grave = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(grave, ignore_errors=True)
    folder.replace(grave)
    shutil.rmtree(grave, ignore_errors=True)
