"""What routes are given: the parts that the application's lifespan built."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from serving.errors import BadInputError
from serving.metrics import Metrics
from serving.services.collections import Collections
from serving.services.embedding import Embedder
from serving.services.label_sets import LabelSets
from serving.services.registry import Registry, ServedModel
from serving.services.retrieval import Retriever
from serving.settings import ServingSettings

__all__ = ["Services", "ServicesDep", "refuse_more_than"]


@dataclass(frozen=True, kw_only=True)
class Services:
    """The models, and the collections of their vectors."""

    settings: ServingSettings
    registry: Registry
    collections: Collections
    label_sets: LabelSets
    metrics: Metrics
    settle: Callable[[], None]
    """What is done when the last request of a model that was replaced has ended."""

    async def load(self, name: str, bundle: str | None) -> ServedModel:
        """Serve a bundle under a name; collections stay with the model of their vectors."""
        try:
            return await self.registry.load(name, bundle)
        finally:
            await self._settle()

    async def unload(self, name: str) -> None:
        """Stop answering under a name; a model that a collection needs is kept for it."""
        await self.registry.unload(name)
        await self._settle()

    async def _settle(self) -> None:
        await self.collections.settle()
        asyncio.get_running_loop().call_later(self.settings.request_seconds, self.settle)

    def embedder(self, name: str | None = None) -> Embedder:
        """The model that a request names, or the default one; NotFoundError if there is none."""
        return self.registry.get(name).embedder

    async def retriever(
        self, collection: str | None = None, *, to_write: bool = False
    ) -> Retriever:
        """The collection that a request names, or the default one.

        NotFoundError if there is none, ConflictError if its model is not served.
        """
        return (await self.collections.get(collection, to_write=to_write)).retriever


async def _services(request: Request) -> Services:
    # async, or FastAPI would hand each request to a thread for this line.
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]


def refuse_more_than(limit: int, found: int, what: str) -> None:
    """Raise BadInputError if a request brings more than the settings allow."""
    if found > limit:
        message = f"{found} {what} in one request; at most {limit} are allowed"
        raise BadInputError(message)
