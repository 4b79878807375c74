"""Bulk import: many image-text pairs into a store, without a server."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from serving.services.embedding import make_thumbnail
from serving.services.recall import (
    HELD_OUT,
    Measurement,
    held_out_queries,
    is_out_of_date,
    read_measurement,
    tune,
    written,
)
from serving.stores import Catalog, Item, Store
from vlm.errors import DataError
from vlm.inference import Encoder
from vlm.preprocess import decode_image

__all__ = ["Pair", "embed_again", "index_items", "index_pairs", "tune_collection"]

_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One image with its caption, to be stored under `id`."""

    id: str
    image: bytes
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


_Entry = TypeVar("_Entry", Pair, Item)


def index_pairs(
    encoder: Encoder,
    store: Store,
    pairs: Iterable[Pair],
    *,
    progress: Callable[[int, int], None],
    broken: Callable[[str], None] | None = None,
) -> tuple[int, int]:
    """Embed the images of pairs and store them; ids that are there already are skipped.

    Each chunk is stored whole, so an interrupted import leaves no half of an item, and running it
    again goes on where it stopped.

    Args:
        encoder: The model whose vectors the store holds.
        store: Where they go.
        pairs: In any order.
        progress: Called after each chunk with (stored, skipped) so far.
        broken: Told of each pair whose image cannot be decoded, with the reason; it is skipped.

    Returns:
        Pairs stored and pairs skipped.

    Raises:
        DataError: If an image cannot be decoded, and nobody is to be told; the message names it.
    """
    return _store(store, pairs, lambda fresh: _items(encoder, fresh, broken), progress)


def index_items(
    store: Store, items: Iterable[Item], *, progress: Callable[[int, int], None]
) -> tuple[int, int]:
    """Store what was embedded before; as `index_pairs` in everything else."""
    return _store(store, items, lambda fresh: fresh, progress)


def _store(
    store: Store,
    entries: Iterable[_Entry],
    items_of: Callable[[list[_Entry]], list[Item]],
    progress: Callable[[int, int], None],
) -> tuple[int, int]:
    """Store what is new of the entries, chunk by chunk; of some, `items_of` may make nothing."""
    stored = skipped = 0
    iterator = iter(entries)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        known = store.existing([entry.id for entry in chunk])
        fresh = items_of([entry for entry in chunk if entry.id not in known])
        store.upsert(fresh)
        stored, skipped = stored + len(fresh), skipped + len(chunk) - len(fresh)
        progress(stored, skipped)
    if stored:
        store.optimize()
    return stored, skipped


def tune_collection(
    encoder: Encoder, store: Store, catalog: Catalog, name: str, *, target: float, exact_below: int
) -> Measurement | None:
    """Index and measure a collection where it has outgrown what is known of it.

    Returns:
        The new measurement; None where none was needed.
    """
    place = catalog.find(name)
    known = read_measurement(None if place is None else place.note)
    if not is_out_of_date(store, known, exact_below=exact_below):
        return None
    queries = held_out_queries(
        store.sample(HELD_OUT), lambda texts: encoder.encode_texts(list(texts))
    )
    found = tune(store, queries, target=target, known=known)
    catalog.note(name, written(found))
    return found


def embed_again(encoder: Encoder, items: list[Item]) -> list[np.ndarray]:
    """Vectors of stored items by another model: of their texts, or of their small pictures.

    Raises:
        DataError: If an item of a picture has none; the message names it.
    """
    pictures = []
    for item in items:
        if item.modality == "image" and item.thumbnail is None:
            message = (
                f"{item.id}: its vector is of a picture, and none is stored with it; "
                f"name the datasets that it came from"
            )
            raise DataError(message)
        if item.modality == "image":
            pictures.append(decode_image(item.thumbnail or b""))
    images = iter(encoder.encode_images(pictures) if pictures else ())
    texts = [item.text or "" for item in items if item.modality == "text"]
    words = iter(encoder.encode_texts(texts) if texts else ())
    return [next(images if item.modality == "image" else words) for item in items]


def _items(encoder: Encoder, pairs: list[Pair], broken: Callable[[str], None] | None) -> list[Item]:
    sound, images = [], []
    for pair in pairs:
        try:
            images.append(decode_image(pair.image, min_side=encoder.info.image.decode_side()))
        except DataError as error:
            message = f"{pair.id}: {error}"
            if broken is None:
                raise DataError(message) from error
            broken(message)
        else:
            sound.append(pair)
    if not sound:
        return []
    rows: np.ndarray = encoder.encode_images(images)
    return [
        Item(
            id=pair.id,
            vector=row,
            text=pair.text,
            metadata=pair.metadata,
            thumbnail=make_thumbnail(image),
        )
        for pair, row, image in zip(sound, rows, images, strict=True)
    ]
