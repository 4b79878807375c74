"""Where vectors are kept."""

from serving.stores.base import Effort, Hit, Item, Snapshots, Store, Versioned, best_first
from serving.stores.embedded import CollectionInfo, EmbeddedStore, read_collection_info
from serving.stores.filters import Filter, IsModality, Modality, matches, parse_filter

__all__ = [
    "CollectionInfo",
    "Effort",
    "EmbeddedStore",
    "Filter",
    "Hit",
    "IsModality",
    "Item",
    "Modality",
    "Snapshots",
    "Store",
    "Versioned",
    "best_first",
    "matches",
    "parse_filter",
    "read_collection_info",
]
