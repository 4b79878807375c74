"""Search among stored items, and keeping them."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.errors import BadInputError, NotFoundError
from serving.services.embedding import Embedder
from serving.services.fetching import RemoteImage
from serving.stores import Hit, Item, Store

__all__ = ["NewItem", "Retriever"]


@dataclass(frozen=True, kw_only=True)
class NewItem:
    """What a client asks to be stored: an image, a text, or both."""

    id: str | None = None
    """None: a hash of the content, so that the same item is stored once."""
    image: bytes | None = None
    text: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


class Retriever:
    """A model and the collection of its vectors."""

    def __init__(self, embedder: Embedder, store: Store) -> None:
        self._embedder = embedder
        self._store = store

    async def search(
        self,
        *,
        text: str | None = None,
        image: bytes | RemoteImage | None = None,
        item_id: str | None = None,
        limit: int,
        where: Mapping[str, Any],
    ) -> list[Hit]:
        """Items nearest to a text, an image or a stored item, best first.

        A stored item is left out of its own results.

        Raises:
            BadInputError: If not exactly one of the three is given, or the image is not one.
            NotFoundError: If no item has `item_id`.
        """
        if sum(given is not None for given in (text, image, item_id)) != 1:
            message = "give exactly one of text, image and id"
            raise BadInputError(message)
        vector = await self._query_vector(text, image, item_id)
        extra = 0 if item_id is None else 1
        hits = await asyncio.to_thread(self._store.search, vector, limit + extra, where)
        return [hit for hit in hits if hit.id != item_id][:limit]

    async def add(self, items: Sequence[NewItem]) -> list[str]:
        """Store items, replacing those of the same id; on disk when this returns.

        The vector is the image's where there is one, else the text's.

        Returns:
            Their ids, in order.

        Raises:
            BadInputError: If an item has neither image nor text, or an image cannot be decoded.
        """
        for number, item in enumerate(items):
            if item.image is None and not (item.text or "").strip():
                message = f"items.{number}: needs an image or a text"
                raise BadInputError(message)
        files = {f"items.{n}.image": i.image for n, i in enumerate(items) if i.image is not None}
        pictures = await self._embedder.prepare(files, thumbnails=True)
        image_rows, text_rows = await asyncio.gather(
            self._embedder.image_rows(pictures),
            self._embedder.text_rows([i.text or "" for i in items if i.image is None]),
        )
        with_image, with_text = iter(zip(image_rows, pictures, strict=True)), iter(text_rows)
        stored = []
        for item_id, item in zip(await asyncio.to_thread(_item_ids, items), items, strict=True):
            row, picture = (next(with_text), None) if item.image is None else next(with_image)
            stored.append(
                Item(
                    id=item_id,
                    vector=row,
                    text=item.text,
                    metadata=item.metadata,
                    thumbnail=None if picture is None else picture.thumbnail,
                )
            )
        await asyncio.to_thread(self._store.upsert, stored)
        return [item.id for item in stored]

    async def get(self, item_id: str) -> Item:
        """Raises NotFoundError if there is none."""
        item = await asyncio.to_thread(self._store.get, item_id)
        if item is None:
            message = f"no item has the id {item_id!r}"
            raise NotFoundError(message)
        return item

    async def delete(self, item_id: str) -> None:
        """Raises NotFoundError if there is none."""
        if not await asyncio.to_thread(self._store.delete, [item_id]):
            message = f"no item has the id {item_id!r}"
            raise NotFoundError(message)

    async def count(self) -> int:
        return await asyncio.to_thread(self._store.count)

    async def _query_vector(
        self, text: str | None, image: bytes | RemoteImage | None, item_id: str | None
    ) -> np.ndarray:
        if text is not None:
            return (await self._embedder.text_rows([text]))[0]
        if image is not None:
            pictures = await self._embedder.prepare({"image": image})
            return (await self._embedder.image_rows(pictures))[0]
        assert item_id is not None
        return (await self.get(item_id)).vector


def _item_ids(items: Sequence[NewItem]) -> list[str]:
    return [_item_id(item) for item in items]


def _item_id(item: NewItem) -> str:
    if item.id is not None:
        return item.id
    digest = hashlib.sha256(item.image or b"")
    digest.update(b"\0" + (item.text or "").encode())
    return digest.hexdigest()[:32]
