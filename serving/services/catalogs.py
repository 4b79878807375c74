"""Which collections a server's settings mean."""

from pathlib import Path
from typing import Final

from serving.settings import EmbeddedStoreConfig, MilvusStoreConfig, ServingSettings
from serving.stores import Catalog, FolderCatalog
from vlm.config import load_config
from vlm.errors import ConfigError

__all__ = ["catalog_at", "open_catalog"]

_SETTINGS: Final = (".yaml", ".yml")


def open_catalog(settings: ServingSettings) -> Catalog:
    """The collections of a server.

    Raises:
        ConfigError: If what the store needs is not installed, or its token cannot be read.
        StoreUnavailableError: If it does not answer.
    """
    match settings.store:
        case EmbeddedStoreConfig():
            return FolderCatalog(settings.index, settings.collections_folder)
        case MilvusStoreConfig():
            return _milvus(settings.store)


def catalog_at(place: Path) -> Catalog:
    """The collections of a folder, that of the default one, or of a server's YAML file.

    Raises:
        ConfigError: If the file or what it says is wrong.
        StoreUnavailableError: If the store does not answer.
    """
    if place.suffix in _SETTINGS:
        return open_catalog(load_config(ServingSettings, place, []))
    return FolderCatalog(place)


def _milvus(config: MilvusStoreConfig) -> Catalog:
    try:
        from serving.stores.milvus_catalog import MilvusCatalog  # noqa: PLC0415 - an extra
        from serving.stores.milvus_cluster import (  # noqa: PLC0415 - an extra
            MilvusCluster,
            MilvusOptions,
        )
    except ImportError as error:
        message = (
            f"store.type=milvus needs pip install 'vlm[serve,milvus]' ({error.name} is missing)"
        )
        raise ConfigError(message) from error
    token = None
    if config.token_file is not None:
        try:
            token = config.token_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            message = f"store.token_file={config.token_file}: {error.strerror}"
            raise ConfigError(message) from error
    told = config.model_dump(exclude={"type", "prefix", "token_file"})
    return MilvusCatalog(MilvusCluster(MilvusOptions(token=token, **told)), prefix=config.prefix)
