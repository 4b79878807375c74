"""Search among stored items, and keeping them."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.errors import BadInputError, NotFoundError
from serving.services.embedding import Embedder, make_thumbnail
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
        image: bytes | None = None,
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
                message = f"item {number}: needs an image or a text"
                raise BadInputError(message)
        with_image = [item for item in items if item.image is not None]
        without = [item for item in items if item.image is None]
        decoded = await self._embedder.decode([i.image for i in with_image if i.image is not None])
        stored = []
        if with_image:
            rows = await self._embedder.image_rows(decoded)
            thumbnails = await asyncio.to_thread(lambda: [make_thumbnail(d) for d in decoded])
            stored += [
                _stored(item, row, thumbnail)
                for item, row, thumbnail in zip(with_image, rows, thumbnails, strict=True)
            ]
        if without:
            rows = await self._embedder.text_rows([item.text or "" for item in without])
            stored += [_stored(item, row, None) for item, row in zip(without, rows, strict=True)]
        await asyncio.to_thread(self._store.upsert, stored)
        return [_item_id(item) for item in items]

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
        self, text: str | None, image: bytes | None, item_id: str | None
    ) -> np.ndarray:
        if text is not None:
            return (await self._embedder.text_rows([text]))[0]
        if image is not None:
            return (await self._embedder.image_rows(await self._embedder.decode([image])))[0]
        assert item_id is not None
        return (await self.get(item_id)).vector


def _stored(item: NewItem, row: np.ndarray, thumbnail: bytes | None) -> Item:
    return Item(
        id=_item_id(item),
        vector=row,
        text=item.text,
        metadata=item.metadata,
        thumbnail=thumbnail,
    )


def _item_id(item: NewItem) -> str:
    if item.id is not None:
        return item.id
    digest = hashlib.sha256(item.image or b"")
    digest.update(b"\0" + (item.text or "").encode())
    return digest.hexdigest()[:32]
