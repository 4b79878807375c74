"""Where vectors are kept."""

from serving.stores.base import CollectionInfo, Effort, Hit, Item, Snapshots, Store, best_first
from serving.stores.embedded import EmbeddedStore, read_collection_info
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
    "best_first",
    "matches",
    "parse_filter",
    "read_collection_info",
]
