"""Single samples by row number, read from their byte offsets."""

import os
import tarfile
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from types import TracebackType

import numpy as np

from vlm.data.manifest import Manifest, split_member_name
from vlm.data.samples import Sample, decode_text_and_metadata
from vlm.errors import DataError

__all__ = ["Reader"]

_MAX_OPEN_SHARDS = 64
_PARTS = ("image", "text", "json")


class Reader:
    """Random access to the samples of a manifest; safe to share between threads.

    Positioned reads never move a file position, so neither threads nor forked processes disturb
    each other. The most recently used shards stay open.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._open: OrderedDict[int, int] = OrderedDict()
        self._lock = Lock()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all shards; a later read opens them again."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def read(self, row: int) -> Sample:
        """The sample of one row, undecoded.

        Raises:
            DataError: If the shard is gone or short, or text or metadata cannot be decoded; the
                message names shard, key and offset.
            IndexError: If there is no such row.
        """
        shard, entry = self.manifest.locate(row)
        path = self.manifest.folder / self.manifest.shards[shard].name
        offset = int(entry["offset"])
        end = max(int(entry[f"{part}_start"] + entry[f"{part}_size"]) for part in _PARTS)
        block = self._pread(shard, path, offset, end)
        key = _key(block)
        try:
            text, metadata = decode_text_and_metadata(
                _part(block, entry, "text"), _part(block, entry, "json") or b"{}"
            )
        except ValueError as error:
            message = f"{path}: sample {key!r} at byte {offset}: {error}; write the shard anew"
            raise DataError(message) from error
        return Sample(key=key, image=_part(block, entry, "image"), text=text, metadata=metadata)

    def name(self, row: int) -> tuple[str, str]:
        """Shard and key of a row, for a report; the key is `?` where it cannot be read."""
        shard, entry = self.manifest.locate(row)
        name = self.manifest.shards[shard].name
        try:
            return name, _key(
                self._pread(shard, self.manifest.folder / name, int(entry["offset"]), 512)
            )
        except DataError:
            return name, "?"

    def _pread(self, shard: int, path: Path, offset: int, size: int) -> bytes:
        # The read happens under the lock so that eviction cannot close the descriptor meanwhile;
        # it copies from the page cache, decoding is what takes time.
        with self._lock:
            descriptor = self._open.pop(shard, None)
            try:
                if descriptor is None:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._open[shard] = descriptor
                if len(self._open) > _MAX_OPEN_SHARDS:
                    os.close(self._open.popitem(last=False)[1])
                block = os.pread(descriptor, size, offset)
                found = os.fstat(descriptor).st_size
            except OSError as error:
                message = f"{path}: cannot be read ({error.strerror})"
                raise DataError(message) from error
        if len(block) < size:
            message = (
                f"{path}: ends at byte {found}, inside a sample that reaches to "
                f"{offset + size}; the shard was cut, run `vlm data index {path.parent}`"
            )
            raise DataError(message)
        return block


def _part(block: bytes, entry: np.void, part: str) -> bytes:
    start, size = int(entry[f"{part}_start"]), int(entry[f"{part}_size"])
    return block[start : start + size]


def _key(block: bytes) -> str:
    """The sample's key, from the first tar header of its block."""
    try:
        name = tarfile.TarInfo.frombuf(block[:512], "utf-8", "surrogateescape").name
    except (
        tarfile.TarError
    ):  # a long-name or pax header comes first; the id still tells samples apart
        return "?"
    return split_member_name(name)[0]
