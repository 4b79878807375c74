"""Named collections of items, each of one model, and the aliases that point to them.

A name is looked up anew for each request: a switch of an alias is seen by the next one, and those
that have begun end with the collection they began with.
"""

import asyncio
import logging
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from serving.errors import BadInputError, ConflictError, NotFoundError, ServingError
from serving.metrics import Metrics
from serving.services.catalogs import open_catalog
from serving.services.embedding import Embedder
from serving.services.recall import (
    HELD_OUT,
    Measurement,
    held_out_queries,
    is_out_of_date,
    read_measurement,
    tune,
    written,
)
from serving.services.registry import Registry
from serving.services.retrieval import Retriever
from serving.services.searching import Tuning
from serving.settings import ServingSettings
from serving.stores import DEFAULT, Catalog, Known, Store, check_collection_name

__all__ = ["Collection", "Collections"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Items of one model, open."""

    name: str
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
        self._known_catalog: Catalog | None = None
        self._open: dict[str, Collection] = {}
        self._last: dict[str, Collection] = {}
        self._changes = asyncio.Lock()
        self._tuning = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Open the default collection, made for the default model if there is none.

        Raises:
            ConfigError: If the store cannot be used as the settings say.
            FingerprintError: If it holds another model's vectors.
            StoreUnavailableError: If the store does not answer.
            ConflictError: If it is an alias, and no served model has its fingerprint.
        """
        self._known_catalog = await asyncio.to_thread(open_catalog, self._settings)
        if DEFAULT not in await self.aliases():
            embedder = self._registry.default.embedder
            self._open[DEFAULT] = await asyncio.to_thread(self._opened, DEFAULT, embedder)
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

    async def names(self) -> list[str]:
        """All collections, the default one first."""
        found = await asyncio.to_thread(self._catalog.names)
        return sorted(found, key=lambda name: (name != DEFAULT, name))

    async def aliases(self) -> dict[str, str]:
        """What names stand for collections."""
        return await asyncio.to_thread(self._catalog.aliases)

    async def get(self, name: str | None = None, *, to_write: bool = False) -> Collection:
        """The collection of a name or alias; the default one for none.

        After a migration whose model is not served yet, the collection before it still answers. It
        takes no writes: nobody would carry them over.

        Raises:
            NotFoundError: If there is none; the message lists those that there are.
            ConflictError: If no model that is served made its vectors.
        """
        asked = name or DEFAULT
        known = await asyncio.to_thread(self._catalog.find, asked)
        if known is None:
            self._open.pop(asked, None)  # another process may have removed it
            raise await self._none_of(asked)
        collection = self._still_open(known)
        if collection is None:
            try:
                collection = await self._open_found(asked)
            except ConflictError as error:
                # An alias was switched before its model is served: the old one goes on answering.
                if asked not in self._last or to_write:
                    raise
                _log.warning(
                    "an alias points to a collection that cannot be searched yet",
                    extra={"alias": asked, "collection": known.name, "reason": str(error)},
                )
                return self._last[asked]
        if self._last.get(asked) is not collection:
            self._last[asked] = collection
            await self.settle()
            if collection.name not in self._open:  # its model was unloaded in between
                return await self.get(name, to_write=to_write)
            collection = self._open[collection.name]
        return collection

    async def settle(self) -> None:
        """Follow a change of models or names: each open collection goes on with its own model.

        One whose model is served anew takes that; one whose model is gone is closed, and so is one
        that no name leads to, where it alone keeps a model. Models that none needs are let go.
        """
        aliases = await self.aliases()
        asked = {collection.name for collection in self._last.values()}
        hidden = set(aliases) - asked
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
        check_collection_name(name)
        embedder = self._registry.get(model).embedder
        async with self._changes:
            known = await asyncio.to_thread(self._catalog.find, name)
            if known is not None and known.name != name:
                message = f"{name!r} is an alias of {known.name!r}"
                raise ConflictError(message)
            if known is not None and known.info.fingerprint != embedder.info.fingerprint:
                message = (
                    f"collection {name!r} is there already, of model "
                    f"{known.info.fingerprint[:12]}, and not of {embedder.info.fingerprint[:12]}"
                )
                raise ConflictError(message)
            if known is None or self._still_open(known) is None:
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
            for alias, target in (await self.aliases()).items():
                if name in (alias, target):
                    message = (
                        f"alias {alias!r} points to {target!r}; point it elsewhere, or remove it"
                    )
                    raise ConflictError(message)
            if name not in await self.names():
                raise await self._none_of(name)
            self._open.pop(name, None)
            self._last = {a: c for a, c in self._last.items() if c.name != name}
            await self.settle()
            await asyncio.to_thread(self._catalog.drop, name)

    async def point(self, alias: str, name: str) -> None:
        """Make an alias stand for a collection, from the next request on.

        Raises:
            BadInputError: If that is no name.
            NotFoundError: If there is no such collection.
            ConflictError: If the alias is a collection, or the model of `name` is not served.
        """
        check_collection_name(alias)
        async with self._changes:
            names = await self.names()
            if alias != DEFAULT and alias in names:
                message = f"{alias!r} is a collection, not an alias"
                raise ConflictError(message)
            if alias != name:
                known = await asyncio.to_thread(self._catalog.find, name)
                if known is None or known.name != name:
                    raise await self._none_of(name)
                if self._still_open(known) is None:
                    await self._open_known(known)
            await asyncio.to_thread(self._catalog.point, alias, name)
            self._last.pop(alias, None)
            await self.settle()

    async def unpoint(self, alias: str) -> None:
        """Take an alias away; what it stood for stays.

        Raises:
            NotFoundError: If there is no such alias.
        """
        aliases = await self.aliases()
        if alias not in aliases:
            message = f"no alias {alias[:64]!r}; there are: {', '.join(sorted(aliases)) or 'none'}"
            raise NotFoundError(message)
        await self.point(alias, alias)

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
            known = await asyncio.to_thread(self._catalog.find, collection.name)
            if known is None or known.made != collection.store.made:
                raise await self._none_of(collection.name)
            note = written(measurement)
            await asyncio.to_thread(self._catalog.note, collection.name, note)
            collection.tuning.measurement = measurement
            collection.tuning.note = note
            self._tell(collection)
            return measurement

    def _consider(self, collection: Collection) -> None:
        """Measure a collection in the background where it has outgrown what is known of it."""
        if not self._tasks:
            task = asyncio.create_task(self._measure_if_needed(collection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _still_open(self, known: Known) -> Collection | None:
        """An open collection, with what another process has noted of it meanwhile."""
        collection = self._open.get(known.name)
        if collection is None:
            return None
        told = collection.store.fingerprint, collection.store.made
        if told != (known.info.fingerprint, known.made):
            del self._open[known.name]
            return None
        if known.note != collection.tuning.note:
            collection.tuning.note = known.note
            collection.tuning.measurement = read_measurement(known.note)
            self._tell(collection)
        return collection

    async def _measure_if_needed(self, collection: Collection) -> None:
        try:
            with self._catalog.alone(collection.name) as alone:
                if alone:
                    await self._measure_alone(collection)
        except ServingError as error:  # it may have been removed meanwhile
            told = {"collection": collection.name, "reason": str(error)}
            _log.warning("a collection could not be measured", extra=told)

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

    async def _open_found(self, asked: str) -> Collection:
        """Open a collection while nobody in this process removes it, or makes it anew."""
        async with self._changes:
            known = await asyncio.to_thread(self._catalog.find, asked)
            if known is None:
                raise await self._none_of(asked)
            return self._still_open(known) or await self._open_known(known)

    async def _open_known(self, known: Known) -> Collection:
        name, fingerprint = known.name, known.info.fingerprint
        model = self._registry.find(fingerprint)
        if model is not None:
            opened = await asyncio.to_thread(self._opened, name, model.embedder)
            return self._open.setdefault(name, opened)
        served = ", ".join(f"{m.name} ({m.info.fingerprint[:12]})" for m in self._registry.served())
        message = (
            f"collection {name!r} holds vectors of model {fingerprint[:12]}, which is not "
            f"served; served: {served}. Similarities between models mean nothing: load that model"
        )
        raise ConflictError(message)

    def _opened(self, name: str, embedder: Embedder) -> Collection:
        info = embedder.info
        store = self._catalog.open(name, fingerprint=info.fingerprint, dim=info.dim)
        known = self._catalog.find(name)
        note = None if known is None or known.name != name else known.note
        tuning = Tuning(
            exact_below=self._settings.exact_below,
            note=note,
            measurement=read_measurement(note),
        )
        collection = Collection(
            name=name,
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

    async def _none_of(self, asked: str) -> NotFoundError:
        known = ", ".join([*await self.names(), *await self.aliases()]) or "none"
        return NotFoundError(f"no collection is called {asked[:64]!r}; there are: {known}")

    @property
    def _catalog(self) -> Catalog:
        assert self._known_catalog is not None, "start() was not awaited"
        return self._known_catalog
