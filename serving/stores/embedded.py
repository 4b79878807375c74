"""The embedded store: LanceDB in a folder.

Searches are exact scans: at the sizes that one folder is meant for they take milliseconds, and
graph indexes at usual settings miss a quarter of the cross-modal neighbours.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from serving.errors import BadInputError, FingerprintError
from serving.stores.base import Hit, Item

__all__ = ["EmbeddedStore"]

_TABLE = "items"
_INFO = "collection.json"
_WRITES_BEFORE_OPTIMIZE = 50
_TIE_MARGIN = 16
# Another process may write, as `vlm index` beside a running server does: look this often.
_REFRESH = timedelta(seconds=1)
# Every write leaves a version; readers that began before are long done after this.
_KEEP_VERSIONS = timedelta(minutes=10)


class EmbeddedStore:
    """A `Store` in a folder, shared by threads.

    What another process writes into the folder is seen within a second.

    Args:
        folder: Made if it is missing.
        fingerprint: Of the model whose vectors are stored.
        dim: Length of the vectors.

    Raises:
        FingerprintError: If the folder holds another model's vectors.
    """

    def __init__(self, folder: Path, *, fingerprint: str, dim: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder / _INFO, fingerprint, dim)
        self.fingerprint = fingerprint
        self._dim = dim
        self._write_lock = threading.Lock()
        self._writes = 0
        schema = pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("vector", pa.list_(pa.float32(), dim), nullable=False),
                pa.field("text", pa.string()),
                pa.field("metadata", pa.string(), nullable=False),
                pa.field("facets", pa.list_(pa.string()), nullable=False),
                pa.field("thumbnail", pa.binary()),
                pa.field("has_thumbnail", pa.bool_(), nullable=False),
            ]
        )
        self._schema = schema
        database = lancedb.connect(str(folder), read_consistency_interval=_REFRESH)
        self._table = database.create_table(_TABLE, schema=schema, exist_ok=True)

    def upsert(self, items: Sequence[Item]) -> None:
        if not items:
            return
        latest = {item.id: item for item in items}  # of equal ids in one call the last one counts
        rows = [self._row(item) for item in latest.values()]
        table = pa.Table.from_pylist(rows, schema=self._schema)
        with self._write_lock:
            (
                self._table.merge_insert("id")
                .when_matched_update_all()
                .when_not_matched_insert_all()
                .execute(table)
            )
            self._writes += 1
            if self._writes % _WRITES_BEFORE_OPTIMIZE == 0:
                self._table.optimize(cleanup_older_than=_KEEP_VERSIONS)

    def delete(self, ids: Sequence[str]) -> int:
        with self._write_lock:
            found = self.existing(ids)
            if found:
                self._table.delete(f"id IN ({_quoted_list(sorted(found))})")
            return len(found)

    def get(self, item_id: str) -> Item | None:
        rows = self._table.search().where(f"id = {_quoted(item_id)}").limit(1).to_list()
        if not rows:
            return None
        row = rows[0]
        return Item(
            id=row["id"],
            vector=np.asarray(row["vector"], np.float32),
            text=row["text"],
            metadata=json.loads(row["metadata"]),
            thumbnail=row["thumbnail"],
        )

    def existing(self, ids: Sequence[str]) -> set[str]:
        if not ids:
            return set()
        query = self._table.search().where(f"id IN ({_quoted_list(ids)})").select(["id"])
        return {row["id"] for row in query.limit(len(ids)).to_list()}

    def search(self, vector: np.ndarray, limit: int, where: Mapping[str, Any]) -> list[Hit]:
        fetched = limit + _TIE_MARGIN
        while True:
            hits = sorted(self._nearest(vector, fetched, where), key=_best_first)
            # Were equal scores cut off beyond the limit, the order by id would not hold.
            if len(hits) < fetched or hits[-1].score < hits[limit - 1].score:
                return hits[:limit]
            fetched *= 4

    def count(self) -> int:
        return int(self._table.count_rows())

    def optimize(self) -> None:
        with self._write_lock:
            self._table.optimize(cleanup_older_than=_KEEP_VERSIONS)

    def _nearest(self, vector: np.ndarray, count: int, where: Mapping[str, Any]) -> list[Hit]:
        # Any: the declared type is the base of several builders, of which this is the vector one.
        nearest: Any = self._table.search(
            np.asarray(vector, np.float32), vector_column_name="vector"
        )
        columns = ["id", "text", "metadata", "has_thumbnail", "_distance"]
        query = nearest.distance_type("cosine").select(columns).limit(count)
        if where:
            query = query.where(" AND ".join(_condition(k, v) for k, v in where.items()))
        return [
            Hit(
                id=row["id"],
                score=round(1.0 - float(row["_distance"]), 6),
                text=row["text"],
                metadata=json.loads(row["metadata"]),
                has_thumbnail=row["has_thumbnail"],
            )
            for row in query.to_list()
        ]

    def _row(self, item: Item) -> dict[str, Any]:
        vector = np.asarray(item.vector, np.float32)
        if vector.shape != (self._dim,):
            message = f"item {item.id!r}: a vector of shape {vector.shape}, expected ({self._dim},)"
            raise ValueError(message)
        return {
            "id": item.id,
            "vector": vector,
            "text": item.text,
            "metadata": json.dumps(item.metadata, sort_keys=True),
            "facets": [_facet(k, v) for k, v in sorted(item.metadata.items()) if _is_scalar(v)],
            "thumbnail": item.thumbnail,
            "has_thumbnail": item.thumbnail is not None,
        }


def _claim(path: Path, fingerprint: str, dim: int) -> None:
    """Write whose vectors a new folder holds, or check it for an old one."""
    if not path.is_file():
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(json.dumps({"fingerprint": fingerprint, "dim": dim}), encoding="utf-8")
        draft.replace(path)
        return
    found = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    if found != fingerprint:
        message = (
            f"{path.parent}: holds vectors of model {found[:12]}, and this is model "
            f"{fingerprint[:12]}; similarities between models mean nothing. Index the data again "
            f"into another folder, or serve the bundle that this index was made with"
        )
        raise FingerprintError(message)


def _best_first(hit: Hit) -> tuple[float, str]:
    return -hit.score, hit.id


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _facet(key: str, value: Any) -> str:
    """One metadata value as a string that equality can be asked of, type included."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _condition(key: str, value: Any) -> str:
    if not _is_scalar(value):
        message = f"filter {key!r}: must be a string, number or boolean"
        raise BadInputError(message)
    return f"array_has(facets, {_quoted(_facet(key, value))})"


def _quoted(text: str) -> str:
    """A SQL string literal; a quote inside is doubled, and nothing else has a meaning in it."""
    return "'" + text.replace("'", "''") + "'"


def _quoted_list(texts: Sequence[str]) -> str:
    return ", ".join(_quoted(text) for text in texts)
