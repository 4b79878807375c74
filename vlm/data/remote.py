"""Datasets in object stores: ranged reads that are tried again, kept in a verified local cache.

Requests go through the obstore package, which takes credentials and endpoints from the
environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, …).
Trying again is done here, in one place, because the answer has to be checked too: its length, and
the size of the object behind it.
"""

import hashlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import Final
from urllib.parse import urlsplit

import obstore
import obstore.exceptions
import obstore.store
from pydantic import Field

from vlm.config import Config
from vlm.data.cache import ByteCache, locked
from vlm.data.manifest import (
    MANIFEST_NAME,
    TABLE_NAMES,
    Manifest,
    ShardInfo,
    open_manifest,
    read_manifest_tree,
)
from vlm.data.shards import Stretch
from vlm.errors import DataError, StoreError
from vlm.files import file_sha256, open_whole

__all__ = ["RemoteConfig", "RemoteShards", "fetch_filter", "fetch_shard", "is_url", "open_remote"]

URL_SCHEMES: Final = ("s3", "gs", "az", "http", "https")
_BLOCK: Final = 8 * 2**20
_PARTS_AHEAD: Final = 4
_MISSING: Final = (FileNotFoundError, obstore.exceptions.NotFoundError)
_FINAL: Final = (
    PermissionError,
    obstore.exceptions.PermissionDeniedError,
    obstore.exceptions.UnauthenticatedError,
    obstore.exceptions.InvalidPathError,
    obstore.exceptions.NotSupportedError,
)


class RemoteConfig(Config):
    """How shards in an object store are fetched and kept."""

    cache: Path = Path("~/.cache/vlm")
    """Folder of fetched bytes, shared by all processes of a machine."""
    cache_bytes: int = Field(20 * 2**30, ge=0)
    """Most that the cache may hold; 0 keeps nothing, and every sample is a request of its own."""
    threads: int = Field(16, ge=1, le=256)
    """Requests at a time, on each rank."""
    timeout_seconds: float = Field(30.0, gt=0)
    """Of one request, and without a byte inside one."""
    attempts: int = Field(10, ge=1)
    """Tries of one request before the run stops."""
    backoff_seconds: float = Field(0.2, gt=0)
    """Pause after the first failure; doubled after each, up to 15 seconds, and varied by half."""


@dataclass
class Traffic:
    """What a process asked of a store so far."""

    requests: int = 0
    failures: int = 0
    bytes: int = 0


class MissingObjectError(DataError):
    """A store answers that it has no such object."""


class _ShortAnswerError(Exception):
    """Fewer bytes than were asked for."""


def is_url(location: str) -> bool:
    """Whether a dataset's location is remote."""
    return "://" in location


class _Store:
    """One dataset's prefix in a store."""

    def __init__(self, url: str, config: RemoteConfig) -> None:
        self.url = url.rstrip("/")
        self.traffic = Traffic()
        self._config = config
        self._lock = Lock()
        # Pauses need no seed: no result depends on them.
        self._jitter = random.Random()
        timeout = timedelta(seconds=config.timeout_seconds)
        options: obstore.store.ClientConfig = {
            "timeout": timeout,
            "connect_timeout": timeout,
            "read_timeout": timeout,
            # Plain HTTP is used where the URL, or the endpoint in the environment, says http://.
            "allow_http": True,
        }
        try:
            self._store = obstore.store.from_url(
                self.url, client_options=options, retry_config={"max_retries": 0}
            )
        except (obstore.exceptions.BaseError, ValueError) as error:
            message = f"{url}: no store can be opened there ({_first_line(error)})"
            raise DataError(message) from error

    def whole(self, name: str) -> bytes:
        """An object of unknown size."""
        return self._patiently(name, lambda: bytes(obstore.get(self._store, name).bytes()))

    def ranged(self, name: str, offset: int, size: int, *, whole_size: int) -> bytes:
        """Bytes of an object of which the size is known.

        Raises:
            DataError: If it is gone or has another size.
            StoreError: If all attempts failed.
        """

        def get() -> bytes:
            answer = obstore.get(self._store, name, options={"range": (offset, offset + size)})
            if answer.meta["size"] != whole_size:
                message = (
                    f"{self.url}/{name}: changed since indexing, {whole_size} bytes then and "
                    f"{answer.meta['size']} now; index the dataset again and upload both"
                )
                raise DataError(message)
            data = bytes(answer.bytes())
            if len(data) != size:
                message = f"{len(data)} bytes came instead of {size}"
                raise _ShortAnswerError(message)
            return data

        return self._patiently(name, get)

    def _patiently(self, name: str, get: Callable[[], bytes]) -> bytes:
        for attempt in range(self._config.attempts):
            try:
                data = get()
            except _MISSING as error:
                message = f"{self.url}/{name}: no such object"
                raise MissingObjectError(message) from error
            except _FINAL as error:
                message = f"{self.url}/{name}: cannot be read ({_first_line(error)})"
                raise DataError(message) from error
            except (obstore.exceptions.BaseError, _ShortAnswerError, OSError) as error:
                self._count(failures=1)
                if attempt + 1 == self._config.attempts:
                    message = (
                        f"{self.url}/{name}: the store failed {attempt + 1} times, at last with: "
                        f"{_first_line(error)}. Start again with --resume when it answers, or "
                        f"raise data.remote.attempts or timeout_seconds"
                    )
                    raise StoreError(message) from error
                pause = min(self._config.backoff_seconds * 2**attempt, 15.0)
                time.sleep(pause * self._jitter.uniform(0.5, 1.0))
            else:
                self._count(size=len(data))
                return data
        raise AssertionError

    def _count(self, *, failures: int = 0, size: int = 0) -> None:
        with self._lock:
            self.traffic.requests += 1
            self.traffic.failures += failures
            self.traffic.bytes += size


class RemoteShards:
    """Shards of one dataset in an object store; a `ShardBytes`.

    Stretches are fetched whole, by a pool of threads, and wait in the cache.
    """

    def __init__(
        self, store: _Store, manifest: Manifest, config: RemoteConfig, cache: ByteCache | None
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
    _check_url(url)
    store = _Store(url, config)
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
    store = _Store(url, config)
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
    store = _Store(url, config)
    with path.open("wb") as file:
        for part in _parts(store, shard.name, shard.num_bytes):
            file.write(part)


def _download(store: _Store, name: str, size: int, sha256: str, path: Path) -> None:
    """A table, in parts that are fetched side by side and tried again one by one."""
    if path.is_file() and path.stat().st_size == size and file_sha256(path) == sha256:
        return
    digest = hashlib.sha256()
    with open_whole(path) as file:
        for part in _parts(store, name, size):
            file.write(part)
            digest.update(part)
        if digest.hexdigest() != sha256:
            message = (
                f"{store.url}/{name}: does not belong to its {MANIFEST_NAME} (other checksum); "
                f"upload both again"
            )
            raise DataError(message)


def _parts(store: _Store, name: str, size: int) -> Iterator[bytes]:
    """An object from its start to its end, a few parts ahead."""
    coming: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(_PARTS_AHEAD) as pool:
        for offset in range(0, size, _BLOCK):
            length = min(_BLOCK, size - offset)
            coming.append(pool.submit(store.ranged, name, offset, length, whole_size=size))
            if len(coming) > _PARTS_AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in URL_SCHEMES or not parts.netloc:
        allowed = ", ".join(f"{scheme}://" for scheme in URL_SCHEMES)
        message = f"{url}: not a folder or a URL that can be read; allowed are {allowed}"
        raise DataError(message)
    if parts.query or parts.username or parts.password:
        message = (
            f"{parts.scheme}://{parts.hostname}{parts.path}: credentials in a URL end up in logs; "
            f"put them into the environment, e.g. AWS_ACCESS_KEY_ID"
        )
        raise DataError(message)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
