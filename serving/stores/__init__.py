"""Where vectors are kept."""

from serving.stores.base import Hit, Item, Store
from serving.stores.embedded import EmbeddedStore

__all__ = ["EmbeddedStore", "Hit", "Item", "Store"]
