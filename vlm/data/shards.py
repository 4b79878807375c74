"""Bytes of shards: positioned reads of local files, and the protocol that remote stores share."""

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol, runtime_checkable

from vlm.data.manifest import Manifest
from vlm.errors import DataError

__all__ = ["LocalShards", "ShardBytes", "Stretch"]

_MAX_OPEN_SHARDS = 64
_MAX_EXPECTED = 65_536


class Stretch(NamedTuple):
    """Neighbouring samples of one shard that are read together, in bytes."""

    shard: int
    offset: int
    size: int


@runtime_checkable  # the tests check argument types
class ShardBytes(Protocol):
    """Where the bytes of a manifest's shards come from; safe to share between threads."""

    def read(self, stretch: Stretch, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the stretch's shard; they lie inside the stretch.

        Raises:
            DataError: If the shard is gone, short, or changed since indexing.
            StoreError: If a remote store does not answer.
        """
        ...

    def expect(self, stretch: Stretch) -> None:
        """Begin to bring a stretch near; it will be read soon."""
        ...

    def close(self) -> None:
        """Let go of files and connections; a later read opens them again."""
        ...


class LocalShards:
    """Shards in the folder of their manifest.

    Positioned reads never move a file position, so neither threads nor forked processes disturb
    each other. The most recently used shards stay open.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._open: OrderedDict[int, int] = OrderedDict()
        self._expected: OrderedDict[Stretch, None] = OrderedDict()
        self._lock = Lock()

    def read(self, stretch: Stretch, offset: int, size: int) -> bytes:
        """See `ShardBytes.read`."""
        info = self._manifest.shards[stretch.shard]
        path = self._manifest.folder / info.name
        # The read happens under the lock so that eviction cannot close the descriptor meanwhile;
        # it copies from the page cache, decoding is what takes time.
        with self._lock:
            try:
                descriptor = self._descriptor(stretch.shard, path)
                block = os.pread(descriptor, size, offset)
                found = os.fstat(descriptor).st_size
            except OSError as error:
                message = f"{path}: cannot be read ({error.strerror})"
                raise DataError(message) from error
        again = f"run `vlm data index {path.parent}`"
        if len(block) < size:
            message = (
                f"{path}: ends at byte {found}, inside a sample that reaches to "
                f"{offset + size}; the shard was cut, {again}"
            )
            raise DataError(message)
        if found != info.num_bytes:
            message = (
                f"{path}: changed since indexing, {info.num_bytes} bytes then and {found} now; "
                f"{again}"
            )
            raise DataError(message)
        return block

    def expect(self, stretch: Stretch) -> None:
        """Ask the kernel to read ahead, in one sweep of the disk; once, while it is in use."""
        with self._lock:
            if stretch in self._expected:
                return
            self._expected[stretch] = None
            if len(self._expected) > _MAX_EXPECTED:
                self._expected.popitem(last=False)
            path = self._manifest.folder / self._manifest.shards[stretch.shard].name
            try:
                descriptor = self._descriptor(stretch.shard, path)
                if hasattr(os, "posix_fadvise"):
                    advice = os.POSIX_FADV_WILLNEED
                    os.posix_fadvise(descriptor, stretch.offset, stretch.size, advice)
            except OSError:
                return  # the read that follows says what is wrong

    def close(self) -> None:
        """Close all shards."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _descriptor(self, shard: int, path: Path) -> int:
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = descriptor
        if len(self._open) > _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor
