"""The connection to a Milvus cluster, and what a collection is made of there."""

import json
import logging
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from serving.errors import FingerprintError, ServingError, StoreUnavailableError
from serving.stores.base import CollectionInfo
from serving.stores.milvus_expressions import DIGEST_CHARACTERS
from serving.stores.milvus_rows import LONGEST_ID, LONGEST_TEXT, MOST_VALUES

__all__ = [
    "LISTS",
    "MilvusCluster",
    "MilvusOptions",
    "check_collection",
    "create_collection",
    "create_index",
    "info_of",
]

LISTS: Final = 1_024
"""Of the index, in each segment; Milvus makes fewer where there are few vectors."""
_FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class MilvusOptions:
    """Where the cluster is, and how new collections lie in it."""

    uri: str
    token: str | None = field(default=None, repr=False)
    database: str = "default"
    timeout_seconds: float = 30.0
    consistency: Literal["session", "strong"] = "session"
    index: Literal["ivf_flat", "flat"] = "ivf_flat"
    shards: int = 1
    replicas: int = 1


class MilvusCluster:
    """A connection, shared by threads.

    Raises:
        StoreUnavailableError: If the cluster does not answer, or does not let us in.
    """

    def __init__(self, options: MilvusOptions) -> None:
        self.options = options
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs what it raises as well
        try:
            self._client = MilvusClient(
                options.uri,
                token=options.token or "",
                db_name=options.database,
                timeout=options.timeout_seconds,
            )
        except MilvusException as error:
            raise _unavailable(options, error) from error

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """What a method of the client returns.

        Raises:
            StoreUnavailableError: If the cluster does not answer in time, or refuses.
        """
        options.setdefault("timeout", self.options.timeout_seconds)
        try:
            return getattr(self._client, method)(*arguments, **options)
        except MilvusException as error:
            raise _unavailable(self.options, error) from error

    def close(self) -> None:
        """Let the connection go."""
        self._client.close()


def read_milvus_info(cluster: MilvusCluster, name: str) -> CollectionInfo | None:
    """What a collection or alias of the cluster holds; None if there is none of ours."""
    if not cluster.call("has_collection", name):
        return None
    return info_of(cluster.call("describe_collection", name))


def info_of(described: dict[str, Any]) -> CollectionInfo | None:
    """What a description of a collection says; None if it is not one of ours."""
    try:
        tree = json.loads(described["description"])
        found = CollectionInfo(fingerprint=tree["fingerprint"], dim=tree["dim"])
    except (ValueError, KeyError, TypeError):
        return None
    if tree.get("format") != _FORMAT:
        message = (
            f"{described['collection_name']}: was made by another version of this program (format "
            f"{tree.get('format')}, this is {_FORMAT}); index the data again under another name"
        )
        raise ServingError(message)
    return found


def create_collection(cluster: MilvusCluster, name: str, fingerprint: str, dim: int) -> None:
    """Make an empty collection, without an index yet."""
    options = cluster.options
    told = {"format": _FORMAT, "fingerprint": fingerprint, "dim": dim}
    schema = MilvusClient.create_schema(
        auto_id=False, enable_dynamic_field=False, description=json.dumps(told)
    )
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=LONGEST_ID)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
    for column in ("modality", "text", "metadata", "thumbnail"):
        schema.add_field(column, DataType.VARCHAR, max_length=LONGEST_TEXT)
    for column in ("facets", "words"):
        schema.add_field(
            column,
            DataType.ARRAY,
            element_type=DataType.VARCHAR,
            max_capacity=MOST_VALUES,
            max_length=DIGEST_CHARACTERS,
        )
    schema.add_field("numbers", DataType.JSON)
    schema.add_field("draw", DataType.INT64)
    for column in ("has_text", "has_thumbnail"):
        schema.add_field(column, DataType.BOOL)
    cluster.call(
        "create_collection",
        name,
        schema=schema,
        num_shards=options.shards,
        consistency_level=options.consistency.capitalize(),
    )


def create_index(cluster: MilvusCluster, name: str) -> None:
    """Say how a collection is indexed, from now on and for good."""
    parameters = MilvusClient.prepare_index_params()
    kind = cluster.options.index.upper()
    lists = {} if kind == "FLAT" else {"nlist": LISTS}
    parameters.add_index("vector", index_type=kind, metric_type="COSINE", params=lists)
    cluster.call("create_index", name, parameters, sync=False)  # there is nothing to wait for


def check_collection(described: dict[str, Any], fingerprint: str) -> None:
    """FingerprintError or ServingError if a collection cannot be used for a model's vectors."""
    name, info = described["collection_name"], info_of(described)
    if info is None:
        message = f"{name}: a collection of the cluster that this program has not made"
        raise ServingError(message)
    if info.fingerprint != fingerprint:
        message = (
            f"{name}: holds vectors of model {info.fingerprint[:12]}, and this is model "
            f"{fingerprint[:12]}; similarities between models mean nothing. Index the data again "
            f"under another name, or serve the bundle that this collection was made with"
        )
        raise FingerprintError(message)


def _unavailable(options: MilvusOptions, error: MilvusException) -> StoreUnavailableError:
    return StoreUnavailableError(f"the store at {options.uri} does not do it: {error.message}")
