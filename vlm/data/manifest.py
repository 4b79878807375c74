"""What lies where in a folder of webdataset tars: a manifest of shards and an index of samples.

    manifest.json   version, fingerprint, counts, and the checksums of the two tables
    shards.npy      a row a shard, memory-mapped: name, samples, bytes, SHA-256
    index.npy       40 bytes a sample, memory-mapped: stable id, offset, and where its image,
                    text and metadata lie behind that offset

The tars stay ordinary: any webdataset user can read them and ignore all three. The manifest is
written last, so a folder with one is complete.
"""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, overload

import numpy as np
from jaxtyping import Int64

from vlm.data.parallel import run_in_order
from vlm.data.scan import INDEX_DTYPE, scan_shard, shard_paths
from vlm.errors import DataError
from vlm.files import file_sha256, open_whole, write_text_whole

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "TABLE_NAMES",
    "Manifest",
    "ShardInfo",
    "build_manifest",
    "holds_shards",
    "indexed_shards",
    "open_manifest",
    "read_manifest_tree",
    "shard_dtype",
]

FORMAT_VERSION: Final = 2
MANIFEST_NAME: Final = "manifest.json"
TABLE_NAMES: Final = ("shards.npy", "index.npy")
_FEW_SHARDS: Final = 10_000
_PARALLEL_FROM: Final = 8


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar, as it was when the manifest was built."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


class _ShardTable(Sequence[ShardInfo]):
    """The rows of `shards.npy`, which stay on disk."""

    def __init__(self, table: np.ndarray) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, number: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[ShardInfo]: ...
    def __getitem__(self, number: int | slice) -> ShardInfo | Sequence[ShardInfo]:
        if isinstance(number, slice):
            return _ShardTable(self._table[number])
        row = self._table[number]
        return ShardInfo(
            name=row["name"].decode(errors="surrogateescape"),
            num_samples=int(row["num_samples"]),
            num_bytes=int(row["num_bytes"]),
            sha256=row["sha256"].tobytes().hex(),
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A dataset, opened. Rows count samples in the order of shards and of members."""

    folder: Path
    """Where the tables are; the shards too, if they are local."""
    location: str
    """Folder or URL of the shards, for messages."""
    shards: Sequence[ShardInfo]
    fingerprint: str
    """Changes with any byte of any shard."""
    index: np.ndarray
    """Memory-mapped rows of `INDEX_DTYPE`."""
    ends: Int64[np.ndarray, " shard"]
    """For each shard the first row after it."""

    @property
    def num_samples(self) -> int:
        return len(self.index)

    @property
    def sample_ids(self) -> Int64[np.ndarray, " sample"]:
        """Stable ids, at least 0: a hash of shard name and key."""
        return self.index["id"]

    def locate(self, row: int) -> tuple[int, np.void]:
        """The number of the shard that holds `row`, and its index entry."""
        if not 0 <= row < self.num_samples:
            message = f"{self.location}: row {row} is out of range, there are {self.num_samples}"
            raise IndexError(message)
        return int(np.searchsorted(self.ends, row, side="right")), self.index[row]

    def where(self, shard: int) -> str:
        """Path or URL of a shard."""
        return f"{self.location.rstrip('/')}/{self.shards[shard].name}"


def build_manifest(
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> Manifest:
    """Scan every tar of a folder and write manifest and tables, each whole or not at all.

    Args:
        folder: Where the shards are, at any depth.
        progress: Called with (shards done, shards in all).
        workers: Processes that scan; by default one a core, and none for a few shards.

    Raises:
        DataError: If there is no shard, or one is not a whole tar of image-text pairs; the
            message names shard, member and offset.
    """
    names = list(shard_paths(folder))
    if not names:
        message = f"{folder}: no .tar shards here; write some with `vlm data write SOURCE {folder}`"
        raise DataError(message)
    shards = []
    # Entries wait on disk, so that memory does not grow with the dataset.
    with tempfile.TemporaryFile(dir=folder) as spool:
        for done, (info, entries) in enumerate(_scanned(folder, names, workers), start=1):
            shards.append(info)
            spool.write(entries.tobytes())
            if progress is not None:
                progress(done, len(names))
        total = sum(shard.num_samples for shard in shards)
        _save(folder / "index.npy", INDEX_DTYPE, total, spool)
    _save_shards(folder / "shards.npy", shards)
    sums = {name: file_sha256(folder / name) for name in TABLE_NAMES}
    tree = {
        "version": FORMAT_VERSION,
        # The table of shards holds the checksum of each, so its own stands for all bytes.
        "fingerprint": sums["shards.npy"],
        "num_shards": len(shards),
        "num_samples": total,
        "num_bytes": sum(shard.num_bytes for shard in shards),
        "tables": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sums[name]}
            for name in TABLE_NAMES
        },
    }
    write_text_whole(folder / MANIFEST_NAME, json.dumps(tree, indent=1) + "\n")
    return open_manifest(folder)


def open_manifest(folder: Path, *, location: str | None = None) -> Manifest:
    """Open a dataset folder and check that its shards are those that were indexed.

    Of many shards the sizes are not looked at here, but when each is first read.

    Args:
        folder: With manifest and tables.
        location: Where the shards are, if not in `folder` too.

    Raises:
        DataError: If the folder is not indexed, the index is damaged, or a shard has vanished or
            changed its size.
    """
    where = location or str(folder)
    again = f"run `vlm data index {where}`"
    try:
        tree = read_manifest_tree((folder / MANIFEST_NAME).read_bytes(), where)
        table = np.load(folder / "shards.npy", mmap_mode="r")
        index = np.load(folder / "index.npy", mmap_mode="r")
        ends = np.cumsum(table["num_samples"], dtype=np.int64)
        whole = index.dtype == INDEX_DTYPE and len(index) == ends[-1] == tree["num_samples"]
    except FileNotFoundError as error:
        if not folder.is_dir():
            message = f"{where}: no such folder; correct the path"
            raise DataError(message) from error
        message = (
            f"{where}: not an indexed dataset, {Path(error.filename).name} is missing; {again}"
        )
        raise DataError(message) from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, IndexError) as error:
        message = f"{where}: manifest or index is damaged ({error}); {again}"
        raise DataError(message) from error
    if not whole:
        message = f"{where}: index.npy does not belong to {MANIFEST_NAME}; {again}"
        raise DataError(message)
    shards = _ShardTable(table)
    if location is None and len(shards) <= _FEW_SHARDS:
        for shard in shards:
            _check_size(folder / shard.name, shard.num_bytes, again)
    return Manifest(
        folder=folder,
        location=where,
        shards=shards,
        fingerprint=tree["fingerprint"],
        index=index,
        ends=ends,
    )


def read_manifest_tree(data: bytes, where: str) -> dict[str, Any]:
    """The content of `manifest.json`, of the version that this code reads.

    Raises:
        DataError: If it is of another version.
        ValueError, TypeError, KeyError: If it is no manifest.
    """
    tree: dict[str, Any] = json.loads(data)
    if tree["version"] != FORMAT_VERSION:
        message = (
            f"{where}: manifest version {tree['version']}, expected {FORMAT_VERSION}; "
            f"run `vlm data index {where}`"
        )
        raise DataError(message)
    return tree


def holds_shards(folder: Path) -> bool:
    """Whether a folder is a set of shards, indexed or not."""
    return (folder / MANIFEST_NAME).is_file() or any(folder.glob("*.[tT][aA][rR]"))


def indexed_shards(folder: Path) -> Sequence[ShardInfo]:
    """What the manifest says of the shards, unchecked; empty where it cannot be read."""
    try:
        read_manifest_tree((folder / MANIFEST_NAME).read_bytes(), str(folder))
        table = np.load(folder / "shards.npy", mmap_mode="r")
        return _ShardTable(table) if table.dtype.names is not None else ()
    except (OSError, ValueError, KeyError, TypeError, EOFError, DataError):
        return ()


def _check_size(path: Path, expected: int, again: str) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        message = f"{path}: the shard is gone ({error.strerror}); bring it back, or {again}"
        raise DataError(message) from error
    if found != expected:
        message = f"{path}: changed since indexing, {expected} bytes then and {found} now; {again}"
        raise DataError(message)


def _scanned(
    folder: Path, names: list[str], workers: int | None
) -> Iterator[tuple[ShardInfo, np.ndarray]]:
    """Facts and entries of each shard, in order."""
    if workers is None:
        workers = (os.cpu_count() or 1) if len(names) >= _PARALLEL_FROM else 1
    scan = functools.partial(_scan, folder)
    with contextlib.closing(run_in_order(scan, names, workers=workers)) as found:
        yield from found


def _scan(folder: Path, name: str) -> tuple[ShardInfo, np.ndarray]:
    entries = scan_shard(folder, name)
    path = folder / name
    info = ShardInfo(
        name=name,
        num_samples=len(entries),
        num_bytes=path.stat().st_size,
        sha256=file_sha256(path),
    )
    return info, entries


def shard_dtype(*, name_bytes: int) -> np.dtype[Any]:
    """Rows of `shards.npy`, whose names have up to `name_bytes` bytes."""
    return np.dtype(
        [
            ("name", f"S{name_bytes}"),
            ("num_samples", "<i8"),
            ("num_bytes", "<i8"),
            ("sha256", "u1", (32,)),
        ]
    )


def _save_shards(path: Path, shards: list[ShardInfo]) -> None:
    names = [os.fsencode(shard.name) for shard in shards]
    table = np.zeros(len(shards), dtype=shard_dtype(name_bytes=max(map(len, names))))
    for row, name, shard in zip(table, names, shards, strict=True):
        digest = np.frombuffer(bytes.fromhex(shard.sha256), dtype=np.uint8)
        row["name"], row["sha256"] = name, digest
        row["num_samples"], row["num_bytes"] = shard.num_samples, shard.num_bytes
    with open_whole(path) as file:
        np.save(file, table)


def _save(path: Path, dtype: np.dtype[Any], count: int, spool: BinaryIO) -> None:
    """A `.npy` of records whose bytes lie in `spool`."""
    spool.seek(0)
    with open_whole(path) as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (count,),
        }
        np.lib.format.write_array_header_1_0(file, header)
        for block in iter(functools.partial(spool.read, 2**24), b""):
            file.write(block)
