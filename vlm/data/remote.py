"""Datasets in object stores: stretches of shards, kept in a verified local cache."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from vlm.data.cache import ByteCache, locked
from vlm.data.manifest import (
    MANIFEST_NAME,
    TABLE_NAMES,
    Manifest,
    ShardInfo,
    open_manifest,
    read_manifest_tree,
)
from vlm.data.object_store import (
    MissingObjectError,
    ObjectStore,
    RemoteConfig,
    check_url,
)
from vlm.data.shards import Stretch
from vlm.errors import DataError
from vlm.files import open_whole

__all__ = ["RemoteConfig", "RemoteShards", "fetch_filter", "fetch_shard", "open_remote"]


class RemoteShards:
    """Shards of one dataset in an object store; a `ShardBytes`.

    Stretches are fetched whole, by a pool of threads, and wait in the cache.
    """

    def __init__(
        self, store: ObjectStore, manifest: Manifest, config: RemoteConfig, cache: ByteCache | None
    ) -> None:
        self.traffic = store.traffic
        self._store = store
        self._manifest = manifest
        self._cache = cache
        self._threads = config.threads
        self._pool = self._new_pool()
        self._coming: dict[Stretch, Future[bytes]] = {}
        self._lock = Lock()

    def read(self, stretch: Stretch, offset: int, size: int) -> bytes:
        """See `ShardBytes.read`."""
        if self._cache is None:
            return self._fetch(Stretch(stretch.shard, offset, size))
        start = offset - stretch.offset
        while (found := self._cache.read(self._name(stretch), start, size)) is None:
            future = self._come(stretch)
            if future is not None:
                return future.result()[start : start + size]
        return found

    def expect(self, stretch: Stretch) -> None:
        """Begin to fetch a stretch, unless it is in the cache."""
        if self._cache is not None:
            self._come(stretch)

    def close(self) -> None:
        """Drop what is on the way, and close the cache."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._new_pool()  # it starts no thread before it is used
        self._coming.clear()
        if self._cache is not None:
            self._cache.close()

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="vlm-fetch")

    def _come(self, stretch: Stretch) -> "Future[bytes] | None":
        """A stretch on its way; none if it is in the cache, perhaps since a moment ago."""
        assert self._cache is not None
        with self._lock:
            future = self._coming.get(stretch)
            if future is None and self._name(stretch) not in self._cache:
                future = self._pool.submit(self._fetch_and_keep, stretch)
                self._coming[stretch] = future
            return future

    def _fetch_and_keep(self, stretch: Stretch) -> bytes:
        assert self._cache is not None
        try:
            data = self._fetch(stretch)
            self._cache.write(self._name(stretch), data)
            return data
        finally:
            # Errors are not kept either: whoever reads next asks the store again.
            with self._lock:
                self._coming.pop(stretch, None)

    def _fetch(self, stretch: Stretch) -> bytes:
        info = self._manifest.shards[stretch.shard]
        return self._store.ranged(
            info.name, stretch.offset, stretch.size, whole_size=info.num_bytes
        )

    def _name(self, stretch: Stretch) -> str:
        """Named by content: a changed shard has other names."""
        digest = self._manifest.shards[stretch.shard].sha256
        return f"{digest[:32]}-{stretch.offset}-{stretch.size}"


def open_remote(url: str, config: RemoteConfig) -> tuple[Manifest, RemoteShards]:
    """Open a dataset in an object store; its tables are downloaded once and verified.

    Args:
        url: `s3://`, `gs://`, `az://` or `https://`, to the folder of shards and manifest.
        config: Cache, time-outs and patience.

    Raises:
        DataError: If the URL is not allowed, or there is no indexed dataset.
        StoreError: If the store does not answer.
    """
    check_url(url)
    store = ObjectStore(url, config)
    try:
        data = store.whole(MANIFEST_NAME)
    except MissingObjectError as error:
        message = (
            f"{error}. Index the shards where they are local, `vlm data index FOLDER`, and upload "
            f"{MANIFEST_NAME}, {' and '.join(TABLE_NAMES)} beside them"
        )
        raise DataError(message) from error
    try:
        tree = read_manifest_tree(data, url)
        tables = {name: tree["tables"][name] for name in TABLE_NAMES}
        fingerprint = str(tree["fingerprint"])
        if not fingerprint.isalnum():
            message = "its fingerprint is no hexadecimal number"
            raise ValueError(message)
    except (ValueError, TypeError, KeyError) as error:
        message = f"{url}: {MANIFEST_NAME} is damaged ({error}); run `vlm data index` and upload it"
        raise DataError(message) from error
    root = config.cache.expanduser()
    folder = root / "tables" / fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        for name, facts in tables.items():
            _download(store, name, facts["bytes"], facts["sha256"], folder / name)
        with open_whole(folder / MANIFEST_NAME) as file:
            file.write(data)
    manifest = open_manifest(folder, location=url)
    cache = None
    if config.cache_bytes:
        cache = ByteCache(root / "stretches", max_bytes=config.cache_bytes)
    return manifest, RemoteShards(store, manifest, config, cache)


def fetch_filter(url: str, name: str, manifest: Manifest, config: RemoteConfig) -> Path:
    """Bring a filter near that lies in `filters/` beside the shards, and the folder it is in now.

    Raises:
        DataError: If there is none; it is not judged here.
        StoreError: If the store does not answer.
    """
    store = ObjectStore(url, config)
    folder = manifest.folder / "filters"
    folder.mkdir(exist_ok=True)
    try:
        mark = store.whole(f"filters/{name}.json")
        rows = store.whole(f"filters/{name}.npy")
    except MissingObjectError as error:
        message = (
            f"{error}; run `vlm data filter {url} --out FOLDER --config FILE name={name}` and "
            f"upload what it writes to {store.url}/filters"
        )
        raise DataError(message) from error
    with locked(folder / ".lock"):
        for data, suffix in ((rows, "npy"), (mark, "json")):
            with open_whole(folder / f"{name}.{suffix}") as file:
                file.write(data)
    return manifest.folder


def fetch_shard(url: str, shard: ShardInfo, path: Path, config: RemoteConfig) -> None:
    """Download one shard, of the size that the manifest says, whatever its bytes are.

    Raises:
        DataError: If it is gone, or has another size.
        StoreError: If the store does not answer.
    """
    store = ObjectStore(url, config)
    with path.open("wb") as file:
        for part in store.parts(shard.name, shard.num_bytes):
            file.write(part)


def _download(store: ObjectStore, name: str, size: int, sha256: str, path: Path) -> None:
    """A table, unless it is here already."""
    if not store.download(name, size, sha256, path):
        message = (
            f"{store.url}/{name}: does not belong to its {MANIFEST_NAME} (other checksum); "
            f"upload both again"
        )
        raise DataError(message)
