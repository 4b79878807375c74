"""A folder in an object store: requests that are tried again until the answer is whole.

Requests go through the obstore package, which takes credentials and endpoints from the
environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, …).
Trying again is done here, in one place, because the answer has to be checked too: its length, and
the size of the object behind it.
"""

import contextlib
import hashlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Final, TypeVar
from urllib.parse import urlsplit

import obstore
import obstore.exceptions
import obstore.store
from pydantic import Field

from vlm.config import Config
from vlm.errors import DataError, StoreError
from vlm.files import file_sha256, open_whole

__all__ = [
    "URL_SCHEMES",
    "MissingObjectError",
    "ObjectStore",
    "RemoteConfig",
    "check_url",
]

URL_SCHEMES: Final = ("s3", "gs", "az", "http", "https")
_BLOCK: Final = 8 * 2**20
_PARTS_AHEAD: Final = 4
_MISSING: Final = (FileNotFoundError, obstore.exceptions.NotFoundError)
_NO_BUCKET: Final = "404 Not Found"
"""In what obstore says of a listing; it has no error of its own for that."""
_FINAL: Final = (
    PermissionError,
    obstore.exceptions.PermissionDeniedError,
    obstore.exceptions.UnauthenticatedError,
    obstore.exceptions.InvalidPathError,
    obstore.exceptions.NotSupportedError,
)
_Answer = TypeVar("_Answer")


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


class _OtherBytesError(Exception):
    """Bytes that do not have the checksum they should."""


class ObjectStore:
    """Objects under one URL.

    Args:
        url: Of the folder; see `check_url`.
        config: Time-outs and patience.

    Raises:
        DataError: If no store can be opened there.
    """

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

    def download(self, name: str, size: int, sha256: str, path: Path) -> bool:
        """An object into a file, unless that is there already.

        Parts are fetched side by side and tried again one by one.

        Returns:
            Whether it has this checksum; if not, no file is written.

        Raises:
            DataError: If it is gone or has another size.
            StoreError: If all attempts failed.
        """
        if path.is_file() and path.stat().st_size == size and file_sha256(path) == sha256:
            return True
        digest = hashlib.sha256()
        try:
            with open_whole(path) as file:
                for part in self.parts(name, size):
                    file.write(part)
                    digest.update(part)
                if digest.hexdigest() != sha256:
                    raise _OtherBytesError
        except _OtherBytesError:
            return False
        return True

    def parts(self, name: str, size: int) -> Iterator[bytes]:
        """An object from its start to its end, a few parts ahead."""
        coming: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(_PARTS_AHEAD) as pool:
            for offset in range(0, size, _BLOCK):
                length = min(_BLOCK, size - offset)
                coming.append(pool.submit(self.ranged, name, offset, length, whole_size=size))
                if len(coming) > _PARTS_AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def put(self, name: str, content: bytes | Path) -> None:
        """Write an object, which appears whole or not at all.

        Raises:
            DataError: If it may not be written.
            StoreError: If all attempts failed.
        """
        self._patiently(name, lambda: obstore.put(self._store, name, content), verb="written")

    def folders(self) -> list[str]:
        """Names of what lies in folders directly under the URL, sorted.

        Raises:
            DataError: If it may not be listed.
            StoreError: If all attempts failed.
        """

        def ask() -> list[str]:
            found = obstore.list_with_delimiter(self._store)["common_prefixes"]
            return sorted(prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in found)

        return self._patiently("", ask, verb="listed")

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each object in a folder under the URL, by its name there.

        Raises:
            DataError: If it may not be listed.
            StoreError: If all attempts failed.
        """

        def ask() -> dict[str, int]:
            found = obstore.list_with_delimiter(self._store, folder)["objects"]
            return {meta["path"].rsplit("/", 1)[-1]: meta["size"] for meta in found}

        return self._patiently(folder, ask, verb="listed")

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects, of which some may be gone already.

        Raises:
            DataError: If they may not be removed.
            StoreError: If all attempts failed.
        """
        for name in names:
            self._patiently(name, partial(self._remove, name), verb="removed")

    def _remove(self, name: str) -> None:
        with contextlib.suppress(*_MISSING):  # some stores say so
            obstore.delete(self._store, name)

    def _patiently(self, name: str, ask: Callable[[], _Answer], *, verb: str = "read") -> _Answer:
        for attempt in range(self._config.attempts):
            try:
                answer = ask()
            except _MISSING as error:
                raise self._missing(name, verb) from error
            except _FINAL as error:
                message = f"{self._place(name)}: cannot be {verb} ({_first_line(error)})"
                raise DataError(message) from error
            except (obstore.exceptions.BaseError, _ShortAnswerError, OSError) as error:
                if verb == "listed" and _NO_BUCKET in str(error):
                    raise self._missing(name, verb) from error
                self._count(failures=1)
                if attempt + 1 == self._config.attempts:
                    message = (
                        f"{self._place(name)}: the store failed {attempt + 1} times, at last with: "
                        f"{_first_line(error)}. Start again with --resume when it answers, or "
                        f"raise data.remote.attempts or timeout_seconds"
                    )
                    raise StoreError(message) from error
                pause = min(self._config.backoff_seconds * 2**attempt, 15.0)
                time.sleep(pause * self._jitter.uniform(0.5, 1.0))
            else:
                self._count(size=len(answer) if isinstance(answer, bytes) else 0)
                return answer
        raise AssertionError

    def _missing(self, name: str, verb: str) -> DataError:
        if verb == "read":
            return MissingObjectError(f"{self._place(name)}: no such object")
        return DataError(f"{self._place(name)}: cannot be {verb}, there is no such bucket")

    def _place(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _count(self, *, failures: int = 0, size: int = 0) -> None:
        with self._lock:
            self.traffic.requests += 1
            self.traffic.failures += failures
            self.traffic.bytes += size


def check_url(url: str, *, schemes: Sequence[str] = URL_SCHEMES) -> None:
    """Refuse what names no folder in a store.

    Raises:
        DataError: If the URL is of another scheme, or holds credentials.
    """
    parts = urlsplit(url)
    if parts.scheme not in schemes or not parts.netloc:
        allowed = ", ".join(f"{scheme}://" for scheme in schemes)
        message = f"{url}: not a folder or a URL that can be used; allowed are {allowed}"
        raise DataError(message)
    if parts.query or parts.username or parts.password:
        message = (
            f"{parts.scheme}://{parts.hostname}{parts.path}: credentials in a URL end up in logs; "
            f"put them into the environment, e.g. AWS_ACCESS_KEY_ID"
        )
        raise DataError(message)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
