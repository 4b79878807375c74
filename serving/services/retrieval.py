"""A collection's items: searching and keeping them."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.errors import BadInputError, NotFoundError
from serving.services.embedding import Embedder
from serving.services.searching import Answer, Question, Searcher, Tuning
from serving.stores import Item, Store, parse_filter
from serving.together import together

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
    """A model and the collection of its vectors.

    Args:
        embedder: Of the model.
        store: Its vectors.
        tuning: How hard to search.
        has_written: Called after each change of the collection.
    """

    def __init__(
        self,
        embedder: Embedder,
        store: Store,
        *,
        tuning: Tuning,
        has_written: Callable[[], None] = lambda: None,
    ) -> None:
        self._embedder = embedder
        self._store = store
        self._searcher = Searcher(embedder, store, tuning)
        self._has_written = has_written

    async def search(self, question: Question) -> Answer:
        """The items that fit best; items that are part of the question are left out.

        Raises:
            BadInputError: If the question cannot be understood, or a picture is none.
            NotFoundError: If a part names an item that is not there.
        """
        return await self._searcher.answer(question)

    async def add(self, items: Sequence[NewItem]) -> list[str]:
        """Store items, replacing those of the same id; on disk when this returns.

        The vector is the image's where there is one, else the text's.

        Returns:
            Their ids, in order.

        Raises:
            BadInputError: If an item has neither image nor text, an image cannot be decoded, or
                two items have one id.
        """
        given: set[str | None] = set()
        for number, item in enumerate(items):
            if item.id is not None and item.id in given:
                message = f"items.{number}: the id {item.id[:64]!r} is given twice"
                raise BadInputError(message)
            given.add(item.id)
            if item.image is None and not (item.text or "").strip():
                message = f"items.{number}: needs an image or a text"
                raise BadInputError(message)
        files = {f"items.{n}.image": i.image for n, i in enumerate(items) if i.image is not None}
        pictures = await self._embedder.prepare(files, thumbnails=True)
        image_rows, text_rows = await together(
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
                    modality="text" if item.image is None else "image",
                    text=item.text,
                    metadata=item.metadata,
                    thumbnail=None if picture is None else picture.thumbnail,
                )
            )
        await asyncio.to_thread(self._store.upsert, stored)
        self._has_written()
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
        if not await self.delete_many([item_id]):
            message = f"no item has the id {item_id!r}"
            raise NotFoundError(message)

    async def delete_where(self, where: Mapping[str, Any]) -> int:
        """Remove all items that fulfil a filter at once; returns how many there were.

        Raises:
            BadInputError: If the filter means nothing.
        """
        gone = await asyncio.to_thread(self._store.delete_where, parse_filter(where))
        self._has_written()
        return gone

    async def delete_many(self, ids: Sequence[str]) -> int:
        """Remove those of the items that there are; returns how many there were."""
        gone = await asyncio.to_thread(self._store.delete, ids)
        self._has_written()
        return gone

    async def page(self, *, limit: int, after: str, where: Mapping[str, Any]) -> list[Item]:
        """Items in the order of their ids, those behind `after`.

        Raises:
            BadInputError: If the filter means nothing.
        """
        wanted = parse_filter(where)
        return await asyncio.to_thread(self._store.scan, limit, after=after, where=wanted)

    async def check(self) -> None:
        """Search once, as questions do; StoreUnavailableError if what is stored is damaged."""
        await self._searcher.check()

    async def count(self, where: Mapping[str, Any] | None = None) -> int:
        return await asyncio.to_thread(self._store.count, parse_filter(where or {}))


def _item_ids(items: Sequence[NewItem]) -> list[str]:
    return [_item_id(item) for item in items]


def _item_id(item: NewItem) -> str:
    if item.id is not None:
        return item.id
    digest = hashlib.sha256(item.image or b"")
    digest.update(b"\0" + (item.text or "").encode())
    return digest.hexdigest()[:32]
