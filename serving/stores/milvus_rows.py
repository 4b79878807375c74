"""Items as rows of Milvus, which knows neither bytes nor missing values, and back."""

import base64
import json
from typing import Any, Final

import numpy as np

from serving.errors import BadInputError
from serving.stores.base import Hit, Item
from serving.stores.captions import words_of
from serving.stores.milvus_expressions import digest, filter_columns

__all__ = ["LONGEST_ID", "LONGEST_TEXT", "MOST_VALUES", "PAYLOAD", "hit_of", "item_of", "row_of"]

LONGEST_ID: Final = 1_024
"""In bytes."""
LONGEST_TEXT: Final = 65_535
MOST_VALUES: Final = 4_096
PAYLOAD: Final = ("modality", "text", "has_text", "metadata", "has_thumbnail")
"""The columns of a hit."""


def row_of(item: Item, *, dim: int) -> dict[str, Any]:
    """The row of an item.

    Raises:
        ValueError: If its vector is of another length.
        BadInputError: If it is larger than Milvus allows; the message says what, and by how much.
    """
    vector = np.asarray(item.vector, np.float32)
    if vector.shape != (dim,):
        message = f"item {item.id!r}: a vector of shape {vector.shape}, expected ({dim},)"
        raise ValueError(message)
    words = words_of(item.text or "")
    row = {
        "id": item.id,
        "vector": vector,
        "modality": item.modality,
        "text": item.text or "",
        "has_text": item.text is not None,
        "metadata": json.dumps(item.metadata, sort_keys=True, ensure_ascii=False),
        **filter_columns(item.metadata),
        "words": sorted({digest(word) for word in words})[:MOST_VALUES],
        "draw": int(digest(item.id)[:8], 16),
        "thumbnail": base64.b64encode(item.thumbnail or b"").decode(),
        "has_thumbnail": item.thumbnail is not None,
    }
    _check_fits(item.id, row)
    return row


def _check_fits(item_id: str, row: dict[str, Any]) -> None:
    """Milvus would refuse all items of a request without saying which one it means."""
    for column, most in (("id", LONGEST_ID), *((c, LONGEST_TEXT) for c in ("text", "metadata"))):
        size = len(row[column].encode())
        if size > most:
            message = f"item {item_id[:64]!r}: {column} has {size} bytes, and at most {most} fit"
            raise BadInputError(message)
    if len(row["thumbnail"]) > LONGEST_TEXT or len(row["facets"]) > MOST_VALUES:
        message = (
            f"item {item_id!r}: a thumbnail may have {LONGEST_TEXT * 3 // 4} bytes and metadata "
            f"{MOST_VALUES} values; make them fewer"
        )
        raise BadInputError(message)


def item_of(row: dict[str, Any]) -> Item:
    """The item of a row with all of its columns."""
    return Item(
        id=row["id"],
        vector=np.asarray(row["vector"], np.float32),
        modality=row["modality"],
        text=row["text"] if row["has_text"] else None,
        metadata=json.loads(row["metadata"]),
        thumbnail=base64.b64decode(row["thumbnail"]) if row["has_thumbnail"] else None,
    )


def hit_of(item_id: str, row: dict[str, Any], score: float) -> Hit:
    """A hit, of a row with the columns of `PAYLOAD`, and perhaps `vector`."""
    vector = row.get("vector")
    return Hit(
        id=item_id,
        score=round(float(score), 6),
        text=row["text"] if row["has_text"] else None,
        metadata=json.loads(row["metadata"]),
        has_thumbnail=row["has_thumbnail"],
        modality=row["modality"],
        vector=None if vector is None else np.asarray(vector, np.float32),
    )
