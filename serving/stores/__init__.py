"""Where vectors are kept."""

from serving.stores.base import (
    CollectionInfo,
    Effort,
    Hit,
    Item,
    Snapshots,
    Store,
    Versioned,
    best_first,
)
from serving.stores.catalog import DEFAULT, Catalog, Known, check_collection_name
from serving.stores.collection_info import read_collection_info
from serving.stores.embedded import EmbeddedStore
from serving.stores.filters import Filter, IsModality, Modality, matches, parse_filter
from serving.stores.folders import FolderCatalog

__all__ = [
    "DEFAULT",
    "Catalog",
    "CollectionInfo",
    "Effort",
    "EmbeddedStore",
    "Filter",
    "FolderCatalog",
    "Hit",
    "IsModality",
    "Item",
    "Known",
    "Modality",
    "Snapshots",
    "Store",
    "Versioned",
    "best_first",
    "check_collection_name",
    "matches",
    "parse_filter",
    "read_collection_info",
]
