"""Single samples by row number, read from their byte offsets."""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from types import TracebackType

import numpy as np
from jaxtyping import Int64

from vlm.data.manifest import Manifest
from vlm.data.samples import Sample, decode_text_and_metadata
from vlm.data.scan import PARTS, sample_id, split_member_name
from vlm.data.shards import LocalShards, ShardBytes, Stretch
from vlm.errors import DataError

__all__ = ["BadSampleError", "Reader"]

_RUNS_AHEAD = 8
_HEADERS = 8192


class BadSampleError(DataError):
    """Text or metadata of one sample cannot be decoded; its shard is as it was indexed."""


class Reader:
    """Random access to the samples of a manifest, or to those that a filter keeps.

    Safe to share between threads.

    Args:
        manifest: The dataset.
        shards: Where the bytes come from; by default the manifest's folder.
        kept: Sorted storage rows; row `i` of the reader is row `kept[i]` of the manifest.
        run_length: Neighbouring rows that are fetched together; see `plan.py`.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        shards: ShardBytes | None = None,
        kept: Int64[np.ndarray, " kept"] | None = None,
        run_length: int = 1,
    ) -> None:
        self.manifest = manifest
        self.num_samples = manifest.num_samples if kept is None else len(kept)
        self._shards = LocalShards(manifest) if shards is None else shards
        self._kept = kept
        self._run_length = run_length

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of any shard, and with the rows that are kept."""
        if self._kept is None:
            return self.manifest.fingerprint
        return hashlib.sha256(self.manifest.fingerprint.encode() + self._kept.tobytes()).hexdigest()

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
        self._shards.close()

    def read(self, row: int) -> Sample:
        """The sample of one row, undecoded.

        Raises:
            BadSampleError: If text or metadata cannot be decoded.
            DataError: If the shard is gone, short or changed; messages name shard, key and offset.
            StoreError: If a remote store does not answer.
            IndexError: If there is no such row.
        """
        shard, entry = self._locate(row)
        offset = int(entry["offset"])
        block = self._shards.read(self._stretch(row, shard, entry), offset, _size(entry))
        key = _key(block)
        if key is not None and sample_id(self.manifest.shards[shard].name, key) != entry["id"]:
            message = (
                f"{self.manifest.where(shard)}: changed since indexing, at byte {offset} lies "
                f"{key!r}, not the sample that the index has there; "
                f"run `vlm data index {self.manifest.location}`"
            )
            raise DataError(message)
        try:
            text, metadata = decode_text_and_metadata(
                _part(block, entry, "text"), _part(block, entry, "json") or b"{}"
            )
        except ValueError as error:
            where = self.manifest.where(shard)
            message = f"{where}: sample {key!r} at byte {offset}: {error}; write the shard anew"
            raise BadSampleError(message) from error
        image = _part(block, entry, "image")
        return Sample(key=key or "?", image=image, text=text, metadata=metadata)

    def sample_ids(self, rows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Stable ids of rows."""
        stored = rows if self._kept is None else self._kept[rows]
        return np.ascontiguousarray(self.manifest.sample_ids[stored])

    def name(self, row: int) -> tuple[str, str]:
        """Shard and key of a row, for a report; the key is `?` where it cannot be read."""
        shard, entry = self._locate(row)
        name = self.manifest.shards[shard].name
        try:
            stretch = self._stretch(row, shard, entry)
            size = min(_size(entry), _HEADERS)
            header = self._shards.read(stretch, int(entry["offset"]), size)
        except DataError:
            return name, "?"
        return name, _key(header) or "?"

    def where(self, row: int) -> str:
        """Path or URL of the shard that holds a row."""
        return self.manifest.where(self._locate(row)[0])

    def expect(self, rows: Int64[np.ndarray, " n"]) -> None:
        """Say which rows come soon, so that their stretches are on the way when they are read."""
        for row in rows.tolist():
            self._shards.expect(self._stretch(row, *self._locate(row)))

    def in_order(self, rows: Int64[np.ndarray, " n"]) -> Iterator[int]:
        """Sorted rows, one by one; their stretches are sent for some time before."""
        block = _RUNS_AHEAD * self._run_length
        for place in range(0, len(rows), block):
            start = place + block if place else 0
            self.expect(rows[start : place + 2 * block : self._run_length])
            yield from rows[place : place + block].tolist()

    def _stored(self, row: int) -> int:
        if self._kept is None:
            return row
        if not 0 <= row < len(self._kept):
            message = (
                f"{self.manifest.location}: row {row} is out of range, {len(self._kept)} are kept"
            )
            raise IndexError(message)
        return int(self._kept[row])

    def _locate(self, row: int) -> tuple[int, np.void]:
        return self.manifest.locate(self._stored(row))

    def _stretch(self, row: int, shard: int, entry: np.void) -> Stretch:
        """From the first to the last row of this row's run, as far as they share its shard."""
        if self._run_length == 1:
            return Stretch(shard, int(entry["offset"]), _size(entry))
        first = row // self._run_length * self._run_length
        last = min(first + self._run_length, self.num_samples) - 1
        start = int(self.manifest.ends[shard - 1]) if shard else 0
        stop = int(self.manifest.ends[shard])
        if self._kept is None:
            low, high = max(first, start), min(last, stop - 1)
        else:
            run = self._kept[first : last + 1]
            inside = run[np.searchsorted(run, start) : np.searchsorted(run, stop)]
            low, high = int(inside[0]), int(inside[-1])
        begin, end = self.manifest.index[low], self.manifest.index[high]
        offset = int(begin["offset"])
        return Stretch(shard, offset, int(end["offset"]) + _size(end) - offset)


def _size(entry: np.void) -> int:
    """Bytes of a sample, from its first header to the end of its last part."""
    return max(int(entry[f"{part}_start"] + entry[f"{part}_size"]) for part in PARTS)


def _part(block: bytes, entry: np.void, part: str) -> bytes:
    start, size = int(entry[f"{part}_start"]), int(entry[f"{part}_size"])
    return block[start : start + size]


def _key(block: bytes) -> str | None:
    """The sample's key, from the tar headers at the start of its block; none if there are none."""
    try:
        header = tarfile.TarInfo.frombuf(block[:512], "utf-8", "surrogateescape")
        if not header.isreg():
            # A header of a long name or of attributes comes before the one with the name.
            with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
                found = tar.next()
            return None if found is None else split_member_name(found.name)[0]
    except tarfile.TarError:
        return None
    return split_member_name(header.name)[0]
