"""The embedded store: LanceDB in a folder.

Without an index searches are exact scans, which take milliseconds up to some ten thousand items.
The index is IVF with RaBitQ codes (arXiv:2405.12497), whose candidates are ranked again by their
exact similarity: graph indexes at usual settings miss a quarter of the cross-modal neighbours.
"""

import functools
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import FTS, BTree, IvfFlat, IvfRq, LabelList

from serving.errors import BadInputError, NotFoundError, ServingError, StoreUnavailableError
from serving.stores.base import Effort, Hit, Item, best_first
from serving.stores.catalog import kept_in_place
from serving.stores.collection_info import claim_folder, made
from serving.stores.filters import Filter
from serving.stores.lance_sql import conjunction, filter_columns, quoted, quoted_list, sql

__all__ = ["EmbeddedStore"]

_log = logging.getLogger(__name__)
_TABLE = "items"
_WRITES_BEFORE_OPTIMIZE = 50
_TIE_MARGIN = 16
_PROBES = (2, 4, 8, 16, 32, 64, 128)
_REFINE = (5, 20, 80)
# Other processes write too, `vlm index` or the other workers of a server: every read looks first
# whether there is a newer version, which costs a tenth of a millisecond.
_REFRESH = timedelta(0)
_SNAPSHOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Every write leaves a version; readers that began before are long done after this. Older ones go,
# but for snapshots and what came after them.
_KEEP_VERSIONS = timedelta(minutes=10)
_BY_ID = {"column_name": "id", "ascending": True, "nulls_first": False}
_REMOVED = "the collection was removed meanwhile; make it again, or ask another"
_PAYLOAD = ["id", "modality", "text", "metadata"]


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _tells_damage(
    method: Callable[Concatenate["EmbeddedStore", _Arguments], _Result],
) -> Callable[Concatenate["EmbeddedStore", _Arguments], _Result]:
    """Tell files that cannot be used as a store that is unavailable, or a collection removed."""

    @functools.wraps(method)
    def told(
        store: "EmbeddedStore", /, *arguments: _Arguments.args, **options: _Arguments.kwargs
    ) -> _Result:
        try:
            return method(store, *arguments, **options)
        except (OSError, RuntimeError, ValueError) as error:
            if made(store.folder) != store.made:
                raise NotFoundError(_REMOVED) from error
            if isinstance(error, ValueError):
                raise
            first = str(error).strip().partition("\n")[0][:300]
            message = (
                f"{store.folder}: cannot be used ({first}); restore a snapshot or a copy, or index "
                f"the data again into another folder"
            )
            raise StoreUnavailableError(message) from error

    return told


class EmbeddedStore:
    """A `Store` with `Snapshots` in a folder, shared by threads and processes.

    What one process has acknowledged, the next read of any other sees.

    Args:
        folder: Made if it is missing.
        fingerprint: Of the model whose vectors are stored.
        dim: Length of the vectors.

    Raises:
        FingerprintError: If the folder holds another model's vectors.
        ServingError: If the folder was made by an earlier version.
    """

    def __init__(self, folder: Path, *, fingerprint: str, dim: int) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.dim = dim
        self._write_lock = threading.Lock()
        self._writes = 0
        self._upkeep: threading.Thread | None = None
        self._schema = _schema(dim)
        self._database = lancedb.connect(str(folder), read_consistency_interval=_REFRESH)
        folder.mkdir(parents=True, exist_ok=True)
        # What is whole is only read here: its folder may be one that takes no writes.
        is_whole = made(folder) and (folder / f"{_TABLE}.lance" / "_versions").is_dir()
        with nullcontext() if is_whole else kept_in_place(folder, alone=True):
            claim_folder(folder, fingerprint, dim)
            self.made = made(folder)
            # Any: half of its methods have no types.
            self._table: Any = self._opened()

    @_tells_damage
    def upsert(self, items: Sequence[Item]) -> None:
        if not items:
            return
        latest = {item.id: item for item in items}  # of equal ids in one call the last one counts
        rows = [self._row(item) for item in latest.values()]
        table = pa.Table.from_pylist(rows, schema=self._schema)
        with self._write_lock, self._in_place():
            (
                self._table.merge_insert("id")
                .when_matched_update_all()
                .when_not_matched_insert_all()
                .execute(table)
            )
            self._has_written()

    @_tells_damage
    def delete(self, ids: Sequence[str]) -> int:
        return self._delete(f"id IN ({quoted_list(sorted(set(ids)))})") if ids else 0

    @_tells_damage
    def delete_where(self, where: Filter) -> int:
        return self._delete(sql(where) or "true")

    @_tells_damage
    def get(self, item_id: str) -> Item | None:
        rows = self._table.search().where(f"id = {quoted(item_id)}").limit(1).to_list()
        return _item(rows[0]) if rows else None

    @_tells_damage
    def existing(self, ids: Sequence[str]) -> set[str]:
        if not ids:
            return set()
        query = self._table.search().where(f"id IN ({quoted_list(ids)})").select(["id"])
        return {row["id"] for row in query.limit(len(ids)).to_list()}

    @_tells_damage
    def search(
        self,
        vector: np.ndarray,
        limit: int,
        where: Filter = (),
        *,
        effort: Effort | None = None,
        vectors: bool = False,
    ) -> list[Hit]:
        fetched = limit + _TIE_MARGIN
        while True:
            hits = sorted(self._nearest(vector, fetched, where, effort, vectors), key=best_first)
            # Were equal scores cut off beyond the limit, the order by id would not hold.
            if len(hits) < fetched or hits[-1].score < hits[limit - 1].score:
                return hits[:limit]
            fetched *= 4

    @_tells_damage
    def search_captions(self, words: str, limit: int, where: Filter = ()) -> list[Hit]:
        if not words.strip():
            return []
        self._index_captions()
        fetched = limit + _TIE_MARGIN
        query: Any = self._table.search(words, query_type="fts", fts_columns="text")
        query = query.select([*_PAYLOAD, "has_thumbnail", "_score"]).limit(fetched)
        clause = sql(where)
        if clause is not None:
            query = query.where(clause, prefilter=True)
        return sorted((_hit(row, row["_score"]) for row in query.to_list()), key=best_first)[:limit]

    @_tells_damage
    def count(self, where: Filter = ()) -> int:
        return int(self._table.count_rows(sql(where)))

    @_tells_damage
    def scan(self, limit: int, *, after: str = "", where: Filter = ()) -> list[Item]:
        clauses = [f"id > {quoted(after)}"] if after else []
        clause = conjunction([*clauses, *filter(None, [sql(where)])])
        query: Any = self._table.search()
        query = query if clause is None else query.where(clause)
        return [_item(row) for row in query.order_by([_BY_ID]).limit(limit).to_list()]

    @_tells_damage
    def sample(self, count: int, *, seed: int = 0) -> list[Item]:
        stored = self.count()
        drawn = np.random.default_rng(seed).choice(stored, min(count, stored), replace=False)
        if not len(drawn):
            return []
        return [_item(row) for row in self._table.take_offsets(sorted(drawn.tolist())).to_list()]

    @property
    def efforts(self) -> Sequence[Sequence[Effort]]:
        return [[Effort(probes, refine) for refine in _REFINE] for probes in _PROBES]

    @property
    @_tells_damage
    def is_indexed(self) -> bool:
        return self._has_index("vector")

    @property
    @_tells_damage
    def version(self) -> int:
        return int(self._table.version)

    @_tells_damage
    def build_index(self) -> None:
        # RaBitQ packs eight dimensions a byte. How many partitions there are is left to LanceDB,
        # which joins and splits them anyway when it takes new rows in.
        kind = IvfRq if self.dim % 8 == 0 else IvfFlat
        with self._in_place():
            self._table.create_index("vector", config=kind(distance_type="cosine"))
            self._table.create_index("facets", config=LabelList())
            self._table.create_index("id", config=BTree())

    @_tells_damage
    def optimize(self) -> None:
        with self._write_lock, self._in_place():
            self._table.optimize(cleanup_older_than=self._retention())

    def snapshot(self, name: str) -> None:
        if not _SNAPSHOT.fullmatch(name):
            message = f"snapshot {name[:64]!r}: a name is 1 to 64 letters, digits, '.', '-' and '_'"
            raise BadInputError(message)
        with self._write_lock, self._in_place():
            self._table.checkout_latest()
            if name in self.snapshots():
                self._table.tags.update(name, self._table.version)
            else:
                self._table.tags.create(name, self._table.version)

    def snapshots(self) -> list[str]:
        return sorted(self._table.tags.list())

    def restore(self, name: str) -> None:
        with self._write_lock, self._in_place():
            self._check_snapshot(name)
            # Through a handle of its own: this one goes on answering in the newest state.
            self._database.open_table(_TABLE).restore(name)
            self._table.checkout_latest()

    def drop_snapshot(self, name: str) -> None:
        with self._write_lock, self._in_place():
            self._check_snapshot(name)
            self._table.tags.delete(name)

    @_tells_damage
    def _opened(self) -> Any:
        files = self.folder / f"{_TABLE}.lance"
        if (files / "data").is_dir() and not (files / "_versions").is_dir():
            message = "its versions are gone"  # LanceDB would begin an empty table over the items
            raise OSError(message)
        return self._database.create_table(_TABLE, schema=self._schema, exist_ok=True)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Let nobody remove the collection, and write into none that was made in its place."""
        with kept_in_place(self.folder):
            if made(self.folder) != self.made:
                raise NotFoundError(_REMOVED)
            yield

    def _retention(self) -> timedelta:
        """How old a version must be to go.

        LanceDB refuses to clean up at all where that would take a version with a name, so nothing
        goes that is younger than the oldest snapshot.
        """
        named = {tag["version"] for tag in self._table.tags.list().values()}
        ages = [
            datetime.now(version["timestamp"].tzinfo) - version["timestamp"]
            for version in (self._table.list_versions() if named else ())
            if version["version"] in named
        ]
        return max([_KEEP_VERSIONS, *(age + timedelta(minutes=1) for age in ages)])

    def _check_snapshot(self, name: str) -> None:
        known = self.snapshots()
        if name not in known:
            message = f"no snapshot {name!r}; there are: {', '.join(known) or 'none'}"
            raise NotFoundError(message)

    def _delete(self, clause: str) -> int:
        with self._write_lock, self._in_place():
            found = int(self._table.count_rows(clause))
            if found:
                self._table.delete(clause)
                self._has_written()
            return found

    def _has_written(self) -> None:
        self._writes += 1
        if self._writes % _WRITES_BEFORE_OPTIMIZE == 0 and (
            self._upkeep is None or not self._upkeep.is_alive()
        ):
            self._upkeep = threading.Thread(target=self._optimize_quietly, name="store-upkeep")
            self._upkeep.start()

    def _optimize_quietly(self) -> None:
        try:
            self.optimize()
        except (ServingError, ValueError):  # another process has written meanwhile, or removed it
            _log.warning("merging small writes failed; the next ones try again", exc_info=True)

    def _index_captions(self) -> None:
        if self._has_index("text"):
            return
        with self._write_lock, self._in_place():
            if not self._has_index("text"):
                self._table.create_index("text", config=FTS(language="English", stem=True))

    def _has_index(self, column: str) -> bool:
        return any(index.columns == [column] for index in self._table.list_indices())

    def _nearest(
        self, vector: np.ndarray, count: int, where: Filter, effort: Effort | None, vectors: bool
    ) -> list[Hit]:
        # Any: the declared type is the base of several builders, of which this is the vector one.
        nearest: Any = self._table.search(
            np.asarray(vector, np.float32), vector_column_name="vector"
        )
        columns = [*_PAYLOAD, "has_thumbnail", "_distance", *(["vector"] if vectors else [])]
        query = nearest.distance_type("cosine").select(columns).limit(count)
        if effort is None:
            query = query.bypass_vector_index()
        else:
            query = query.nprobes(effort.probes).refine_factor(effort.refine)
        clause = sql(where)
        if clause is not None:
            query = query.where(clause, prefilter=True)
        return [_hit(row, 1.0 - float(row["_distance"])) for row in query.to_list()]

    def _row(self, item: Item) -> dict[str, Any]:
        vector = np.asarray(item.vector, np.float32)
        if vector.shape != (self.dim,):
            message = f"item {item.id!r}: a vector of shape {vector.shape}, expected ({self.dim},)"
            raise ValueError(message)
        return {
            "id": item.id,
            "vector": vector,
            "modality": item.modality,
            "text": item.text,
            "metadata": json.dumps(item.metadata, sort_keys=True),
            **filter_columns(item.metadata),
            "thumbnail": item.thumbnail,
            "has_thumbnail": item.thumbnail is not None,
        }


def _schema(dim: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dim), nullable=False),
            pa.field("modality", pa.string(), nullable=False),
            pa.field("text", pa.string()),
            pa.field("metadata", pa.string(), nullable=False),
            pa.field("facets", pa.list_(pa.string()), nullable=False),
            pa.field("keys", pa.list_(pa.string()), nullable=False),
            pa.field("numbers", pa.list_(pa.float64()), nullable=False),
            pa.field("strings", pa.list_(pa.string()), nullable=False),
            pa.field("thumbnail", pa.binary()),
            pa.field("has_thumbnail", pa.bool_(), nullable=False),
        ]
    )


def _item(row: dict[str, Any]) -> Item:
    return Item(
        id=row["id"],
        vector=np.asarray(row["vector"], np.float32),
        modality=row["modality"],
        text=row["text"],
        metadata=json.loads(row["metadata"]),
        thumbnail=row["thumbnail"],
    )


def _hit(row: dict[str, Any], score: float) -> Hit:
    vector = row.get("vector")
    return Hit(
        id=row["id"],
        score=round(float(score), 6),
        text=row["text"],
        metadata=json.loads(row["metadata"]),
        has_thumbnail=row["has_thumbnail"],
        modality=row["modality"],
        vector=None if vector is None else np.asarray(vector, np.float32),
    )
