"""Which models are served, under which names.

A request takes a model once, by reference, and keeps it to its end. So putting another bundle under
a name is one assignment: who came before goes on with the old model, which is freed by the last of
them, and no request is dropped.

A model that has lost its last name is kept, under its fingerprint, as long as an open collection
holds its vectors: nothing else can search them.
"""

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from serving.caching import RowCache
from serving.errors import BadInputError, ConflictError, NotFoundError, OverloadedError
from serving.metrics import Metrics
from serving.services.captioning import CaptionWriter
from serving.services.embedding import Embedder
from serving.services.shelf import (
    BUNDLE_NAMES,
    is_bundle_name,
    is_fingerprint,
    local_bundle,
    open_shelf,
    without_places,
)
from serving.services.workers import Workers
from serving.settings import ServingSettings
from vlm.errors import BundleError, StoreError
from vlm.inference import BundleInfo, Captioner, Encoder, load_bundle, read_bundle_info
from vlm.inference.runtimes import Figures, default_cache, fastest_runtime, gated_runtime

__all__ = ["Registry", "ServedModel"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A bundle that answers under a name."""

    name: str
    embedder: Embedder
    figures: tuple[Figures, ...]
    """Of the runtimes that were considered, the fastest first."""
    writer: CaptionWriter | None = None
    """Where the model writes captions."""

    @property
    def info(self) -> BundleInfo:
        return self.embedder.info


class Registry:
    """Models by name; all of them share the threads. Used from the event loop alone.

    Args:
        settings: Which bundle is the default one, where others lie, and what computes.
        metrics: Where models, sizes and times are told.
    """

    def __init__(self, settings: ServingSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._served: dict[str, ServedModel] = {}
        self._shelf = open_shelf(settings)
        self._kept: dict[str, ServedModel] = {}
        self._changes = asyncio.Lock()
        self._default_name = ""
        self._cache = RowCache(settings.cache_bytes, metrics)
        self.workers = Workers(settings.decode_threads)

    async def start(self) -> None:
        """Load the default model and those of `preload`; each has computed when this returns.

        Raises:
            BundleError: If a bundle cannot be loaded or trusted, or its runtime strays.
        """
        folder = await asyncio.to_thread(local_bundle, self._settings)
        info = await asyncio.to_thread(read_bundle_info, folder)
        if is_fingerprint(info.name):
            message = f"{folder}: calls itself {info.name!r}, like a fingerprint; {BUNDLE_NAMES}"
            raise BundleError(message)
        self._default_name = info.name
        await self._serve(info.name, folder)
        for name in self._settings.preload:
            if not is_bundle_name(name):
                message = f"preload: a model cannot be called {name!r}: {BUNDLE_NAMES}"
                raise BundleError(message)
            found = await asyncio.to_thread(self._shelf.folder, name)
            if found is None:
                known = ", ".join(await self.available()) or "none"
                message = f"preload: no bundle {name!r} in {self._settings.models}; there: {known}"
                raise BundleError(message)
            if name in self._served:
                message = f"preload: {name!r} is the name of the default model; rename the folder"
                raise BundleError(message)
            await self._serve(name, found)

    @property
    def default(self) -> ServedModel:
        """What answers where a request names no model."""
        return self._served[self._default_name]

    def served(self) -> list[ServedModel]:
        """All models that answer, the default one first, those without a name last."""
        named = (m for m in self._served.values() if m is not self.default)
        return [self.default, *named, *self._kept.values()]

    def find(self, fingerprint: str) -> ServedModel | None:
        """The model of a fingerprint, one with a name if there is one."""
        same = (m for m in self.served() if m.info.fingerprint == fingerprint)
        return next(same, None)

    def is_kept(self, fingerprint: str) -> bool:
        """Whether a model answers under no name, for its collections alone."""
        return fingerprint in self._kept

    def keep_only(self, fingerprints: Collection[str]) -> None:
        """Let go of models that lost their names, but for those."""
        for fingerprint in set(self._kept) - set(fingerprints):
            self._tell(self._kept.pop(fingerprint), present=False)

    async def available(self) -> list[str]:
        """Bundles in the folder of models, served or not, by name."""
        return await asyncio.to_thread(self._shelf.names)

    def get(self, name: str | None) -> ServedModel:
        """The model of that name or fingerprint; the default one for none.

        Raises:
            NotFoundError: If there is none; the message lists those that are served.
        """
        if name is None:
            return self.default
        found = self._served.get(name) or self.find(name)
        if found is not None:
            return found
        known = ", ".join(repr(known) for known in self._served)
        message = f"no model is called {name[:64]!r}; served: {known}"
        raise NotFoundError(message)

    async def load(self, name: str, bundle: str | None = None) -> ServedModel:
        """Serve a bundle of the folder under a name, in place of what it stood for.

        The bundle is verified, gated and run before the name points to it; until then, and if that
        fails, the old model answers.

        Args:
            name: Under which requests ask for it.
            bundle: Its folder's name; none: the same as `name`.

        Raises:
            NotFoundError: If there is no such bundle.
            BadInputError: If the name is none, or the bundle cannot be loaded or trusted, or its
                runtime strays.
            ConflictError: If there are several processes, which would then differ.
            OverloadedError: If the store of bundles does not answer.
        """
        self._refuse_if_many()
        if not is_bundle_name(name):
            message = f"a model cannot be called {name[:64]!r}: {BUNDLE_NAMES}"
            raise BadInputError(message)
        wanted = bundle or name
        async with self._changes:
            try:
                folder = await asyncio.to_thread(self._shelf.folder, wanted)
                if folder is None:
                    known = ", ".join(await self.available()) or "none"
                    message = f"no bundle is called {wanted[:64]!r}; there are: {known}"
                    raise NotFoundError(message)
                return await self._serve(name, folder)
            except BundleError as error:
                why = without_places(str(error), self._settings)
                message = f"bundle {wanted!r} cannot be served: {why}"
                raise BadInputError(message) from error
            except StoreError as error:
                _log.warning("a bundle could not be fetched", extra={"reason": str(error)})
                message = "the store of bundles does not answer; try again later"
                raise OverloadedError(message) from error

    async def unload(self, name: str) -> None:
        """Stop answering under a name, or for collections; requests that have begun are finished.

        Args:
            name: Of the model; of one that is only kept, its fingerprint.

        Raises:
            NotFoundError: If nothing is served under it.
            ConflictError: If it is the default model, or there are several processes.
        """
        self._refuse_if_many()
        async with self._changes:
            if name == self._default_name:
                message = f"{name!r} is the default model, which stays; load another in its place"
                raise ConflictError(message)
            if name in self._kept:
                self._tell(self._kept.pop(name), present=False)
                return
            if name not in self._served:
                self.get(name)
                message = f"{name[:64]!r} is a fingerprint; unload by name"
                raise NotFoundError(message)
            self._take_away(self._served.pop(name))

    def _refuse_if_many(self) -> None:
        if self._settings.processes > 1:
            message = (
                f"{self._settings.processes} processes serve here and would differ; change the "
                f"settings and restart, or serve with workers=1"
            )
            raise ConflictError(message)

    async def check(self, *, seconds: float | None) -> None:
        """Run every model; raises what the first broken one raises, TimeoutError if it is stuck."""
        for model in self.served():
            await model.embedder.check(seconds=seconds)

    async def _serve(self, name: str, folder: Path) -> ServedModel:
        encoder, captioner, figures = await asyncio.to_thread(_gated, folder, self._settings)
        embedder = Embedder(
            encoder, self._settings, self._metrics, workers=self.workers, cache=self._cache
        )
        await embedder.check(seconds=None)  # warm up, and fail before anybody is sent here
        writer = None
        if captioner is not None:
            most = self._settings.max_waiting
            writer = CaptionWriter(captioner, embedder, workers=self.workers, max_waiting=most)
        model = ServedModel(name=name, embedder=embedder, figures=figures, writer=writer)
        replaced = self._served.get(name)
        self._served[name] = model
        if replaced is not None:
            self._take_away(replaced)
        if self.is_kept(model.info.fingerprint):
            self._tell(self._kept.pop(model.info.fingerprint), present=False)
        self._tell(model, present=True)
        return model

    def _take_away(self, model: ServedModel) -> None:
        """A model has lost a name: it is kept until `keep_only` says who is needed."""
        self._tell(model, present=False)
        fingerprint = model.info.fingerprint
        if self.find(fingerprint) is None:
            self._kept[fingerprint] = replace(model, name=fingerprint)
            self._tell(self._kept[fingerprint], present=True)

    def _tell(self, model: ServedModel, *, present: bool) -> None:
        labels = (model.name, model.info.fingerprint, model.embedder.runtime)
        if present:
            self._metrics.model.labels(*labels).set(1)
        else:
            self._metrics.model.remove(*labels)


def _gated(
    folder: Path, settings: ServingSettings
) -> tuple[Encoder, Captioner | None, tuple[Figures, ...]]:
    """The bundle in the runtime asked for.

    Its torch model is let go where another runtime computes, unless it writes captions.
    """
    bundle = load_bundle(folder)
    cache = settings.runtimes or default_cache(folder)
    device, streams = settings.device, settings.streams_here
    if settings.runtime == "auto":
        choice = fastest_runtime(bundle, device=device, cache=cache, streams=streams)
    else:
        name = settings.runtime
        choice = gated_runtime(name, bundle, device=device, cache=cache, streams=streams)
    writes = bundle.info.model_kind == "coca"
    captioner = Captioner(bundle, device=settings.device) if writes else None
    figures = tuple(_for_clients(entry, settings) for entry in choice.figures)
    return Encoder(bundle, runtime=choice.runtime), captioner, figures


def _for_clients(figures: Figures, settings: ServingSettings) -> Figures:
    """The same; why a runtime may not answer is told without the folder of its export."""
    if figures.refused is None:
        return figures
    return figures.model_copy(update={"refused": without_places(figures.refused, settings)})
