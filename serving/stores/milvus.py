"""The cluster store: a collection in Milvus, which many serving processes share.

Everything that is known of a collection lies in the cluster, so that what serves it keeps nothing:
items in its columns, whose vectors they are in its description. The index is IVF-FLAT: like exact
search, which is the same index with all of its lists looked into, it compares raw vectors; graph
indexes have no exact search to be measured against.

Milvus answers from a state that lags by up to one time tick (200 ms as it comes). A read waits
until it sees what this process has written before; with `consistency="strong"`, what any has.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from serving.stores.base import Effort, Hit, Item, best_first
from serving.stores.captions import bm25, words_of
from serving.stores.filters import Contains, Filter, matches
from serving.stores.milvus_cluster import (
    LISTS,
    MilvusCluster,
    check_collection,
    create_collection,
    create_index,
)
from serving.stores.milvus_expressions import all_of, any_word, one_of_ids, quoted, translated
from serving.stores.milvus_rows import PAYLOAD, hit_of, item_of, row_of

__all__ = ["MilvusStore"]

_TIE_MARGIN: Final = 16
_MOST_HITS: Final = 16_384
"""Milvus gives no more in one answer."""
_PAGE: Final = 256
"""Rows with everything that is stored in one answer, which may have 64 MiB."""
_SLIM_PAGE: Final = 8_192
_IDS: Final = 2_000
"""In one expression."""
_MOST_CAPTIONS: Final = 10_000
_INDEX_SECONDS: Final = 3_600.0
_LOAD_SECONDS: Final = 1_800.0
_DRAWS: Final = 2**32
_log = logging.getLogger(__name__)


class MilvusStore:
    """A `Store` in a cluster, shared by threads and by processes.

    Args:
        cluster: Where it is.
        name: Of the collection there; made if it is missing.
        fingerprint: Of the model whose vectors are stored.
        dim: Length of the vectors.

    Raises:
        FingerprintError: If the collection holds another model's vectors.
        ServingError: If the collection was made by another version, or by others.
    """

    def __init__(self, cluster: MilvusCluster, name: str, *, fingerprint: str, dim: int) -> None:
        self.fingerprint = fingerprint
        self.dim = dim
        self.made = None
        self._cluster = cluster
        self._name = name
        self._write_lock = threading.Lock()
        self._writes = 0
        self._level = cluster.options.consistency.capitalize()
        if not cluster.call("has_collection", name):
            create_collection(cluster, name, fingerprint, dim)
        check_collection(cluster.call("describe_collection", name), fingerprint)
        # Made whole by whoever comes next, should its maker have been stopped in between.
        if not cluster.call("list_indexes", name):
            create_index(cluster, name)
        # One that is loaded keeps its copies: with another number of them it is refused.
        if str(cluster.call("get_load_state", name)["state"]) != "Loaded":
            replicas = cluster.options.replicas
            cluster.call("load_collection", name, replica_number=replicas, timeout=_LOAD_SECONDS)
        kind = cluster.call("describe_index", name, "vector")["index_type"]
        self._is_flat = kind == "FLAT"
        # What was written before, by whomever, is seen from here on: a server that has just started
        # answers before it has read all of its log again.
        self._query("", ["count(*)"], None, level="Strong")

    @property
    def efforts(self) -> Sequence[Sequence[Effort]]:
        """Lists to look into; what is found there is compared exactly."""
        if self._is_flat:
            return ()
        return tuple((Effort(2**power, 1),) for power in range(1, 10))

    def upsert(self, items: Sequence[Item]) -> None:
        if not items:
            return
        latest = {item.id: item for item in items}  # of equal ids in one call the last one counts
        rows = [row_of(item, dim=self.dim) for item in latest.values()]
        with self._write_lock:
            self._call("upsert", rows)
            self._writes += 1

    def delete(self, ids: Sequence[str]) -> int:
        with self._write_lock:
            known = sorted(self.existing(ids))
            self._remove(known)
            return len(known)

    def delete_where(self, where: Filter) -> int:
        # By their ids in one request, since what Milvus removes by an expression goes bit by bit.
        with self._write_lock:
            known = [
                row["id"]
                for expression in self._expressions(where)
                for row in self._rows(expression, ["id"], page=_SLIM_PAGE)
            ]
            self._remove(known)
            return len(known)

    def get(self, item_id: str) -> Item | None:
        rows = self._query(one_of_ids([item_id]), ["*"], 1)
        return item_of(rows[0]) if rows else None

    def existing(self, ids: Sequence[str]) -> set[str]:
        wanted = sorted(set(ids))
        found: set[str] = set()
        for start in range(0, len(wanted), _IDS):
            some = wanted[start : start + _IDS]
            found |= {row["id"] for row in self._query(one_of_ids(some), ["id"], len(some))}
        return found

    def search(
        self,
        vector: np.ndarray,
        limit: int,
        where: Filter = (),
        *,
        effort: Effort | None = None,
        vectors: bool = False,
    ) -> list[Hit]:
        expressions = self._expressions(where)
        limit = min(limit, _MOST_HITS)
        fetched = min(limit + _TIE_MARGIN, _MOST_HITS)
        while True:
            found = [
                hit
                for expression in expressions
                for hit in self._nearest(vector, fetched, expression, effort, vectors)
            ]
            hits = sorted(found, key=best_first)[:fetched]
            # Were equal scores cut off beyond the limit, the order by id would not hold.
            is_whole = len(hits) < fetched or fetched == _MOST_HITS
            if is_whole or hits[-1].score < hits[limit - 1].score:
                return hits[:limit]
            fetched = min(4 * fetched, _MOST_HITS)

    def search_captions(self, words: str, limit: int, where: Filter = ()) -> list[Hit]:
        wanted = words_of(words)
        if not wanted:
            return []
        rows: list[dict[str, Any]] = []
        for expression in self._expressions(where, any_word(wanted)):
            left = _MOST_CAPTIONS - len(rows)
            rows += self._rows(expression, ["id", *PAYLOAD], page=_PAGE, limit=left)
        scores = bm25(wanted, [words_of(row["text"]) for row in rows], total=self.count())
        hits = [hit_of(row["id"], row, score) for row, score in zip(rows, scores, strict=True)]
        return sorted(hits, key=best_first)[:limit]

    def count(self, where: Filter = ()) -> int:
        return sum(
            int(self._query(expression, ["count(*)"], None)[0]["count(*)"])
            for expression in self._expressions(where)
        )

    def scan(self, limit: int, *, after: str = "", where: Filter = ()) -> list[Item]:
        found = [
            row
            for expression in self._expressions(where, after=after)
            for row in self._rows(expression, ["*"], page=_PAGE, limit=limit, after=after)
        ]
        return [item_of(row) for row in sorted(found, key=lambda row: row["id"])[:limit]]

    def sample(self, count: int, *, seed: int = 0) -> list[Item]:
        # Each item has drawn a number; those are taken whose numbers follow a drawn one.
        stored = self.count()
        rng = np.random.default_rng(seed)
        start, width = int(rng.integers(_DRAWS)), 2 * _DRAWS * count // max(1, stored) + 1
        found: list[str] = []
        while len(found) < min(count, stored):
            width = min(2 * width, _DRAWS)
            end = (start + width) % _DRAWS
            joined = "and" if end > start else "or"
            window = f"draw >= {start} {joined} draw < {end}" if width < _DRAWS else ""
            found = [row["id"] for row in self._rows(window, ["id"], page=_SLIM_PAGE)]
            if width == _DRAWS:
                break
        drawn = rng.choice(found, min(count, len(found)), replace=False).tolist() if found else []
        chosen = one_of_ids(drawn)
        return [item_of(row) for row in self._rows(chosen, ["*"], page=_PAGE)] if drawn else []

    @property
    def is_indexed(self) -> bool:
        found = self._call("describe_index", "vector")
        return not self._is_flat and int(found.get("indexed_rows", 0)) > 0

    @property
    def version(self) -> int:
        """Another number after each write of this object, and each second for those of others."""
        return (self._writes << 32) + int(time.monotonic())

    def build_index(self) -> None:
        # The kind is fixed when the collection is made, and Milvus indexes part by part as they
        # fill; what is new is closed as a part of its own.
        self._flush()

    def optimize(self) -> None:
        self._flush()
        self._call("compact")

    def _flush(self) -> None:
        """Write what is new to the object store, and wait until that is indexed."""
        with self._write_lock:
            self._call("flush", timeout=_INDEX_SECONDS)
        end = time.monotonic() + _INDEX_SECONDS
        while True:
            found = self._call("describe_index", "vector")
            if not int(found.get("pending_index_rows", 0)):
                return
            if time.monotonic() > end:
                _log.warning("the cluster is still indexing", extra={"collection": self._name})
                return
            time.sleep(0.2)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._cluster.call(method, self._name, *arguments, **options)

    def _remove(self, ids: Sequence[str]) -> None:
        if not ids:
            return
        self._call("delete", filter=one_of_ids(ids))
        # Unlike an upsert, this does not tell when it happened, so that no later read could wait
        # for it; one that waits for everything does it for them.
        self._query(one_of_ids(ids[:1]), ["id"], 1, level="Strong")
        self._writes += 1

    def _expressions(self, where: Filter, also: str = "", *, after: str = "") -> list[str]:
        """Expressions that together let through what fulfils a filter; none if nothing does."""
        native = all_of(translated(where), also)
        if not any(isinstance(condition, Contains) for condition in where):
            return [native]
        fields = ["id", "metadata", "modality"]
        found = [
            row["id"]
            for row in self._rows(native, fields, page=_PAGE, after=after)
            if matches(where, json.loads(row["metadata"]), row["modality"])
        ]
        return [one_of_ids(found[start : start + _IDS]) for start in range(0, len(found), _IDS)]

    def _rows(
        self,
        expression: str,
        fields: list[str],
        *,
        page: int,
        limit: int | None = None,
        after: str = "",
    ) -> Iterator[dict[str, Any]]:
        """Rows in the order of their ids, which is the order in which Milvus answers queries."""
        left = limit
        while left is None or left > 0:
            count = page if left is None else min(page, left)
            behind = f"id > {quoted(after)}" if after else ""
            rows = self._query(all_of(expression, behind), fields, count)
            yield from rows
            if len(rows) < count:
                return
            after = rows[-1]["id"]
            left = None if left is None else left - len(rows)

    def _query(
        self, expression: str, fields: list[str], limit: int | None, *, level: str = ""
    ) -> list[dict[str, Any]]:
        bounds = {} if limit is None else {"limit": limit}
        found = self._call(
            "query",
            filter=expression,
            output_fields=fields,
            consistency_level=level or self._level,
            **bounds,
        )
        return sorted(found, key=lambda row: row.get("id", ""))

    def _nearest(
        self, vector: np.ndarray, count: int, where: str, effort: Effort | None, vectors: bool
    ) -> list[Hit]:
        probes = LISTS if effort is None else min(effort.probes, LISTS)
        parameters = {} if self._is_flat else {"nprobe": probes}
        (found,) = self._call(
            "search",
            [np.asarray(vector, np.float32)],
            limit=count,
            filter=where,
            output_fields=[*PAYLOAD, *(["vector"] if vectors else [])],
            search_params={"metric_type": "COSINE", "params": parameters},
            anns_field="vector",
            consistency_level=self._level,
        )
        return [hit_of(row["id"], row["entity"], row["distance"]) for row in found]
