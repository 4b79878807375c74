"""What lies where in a folder of webdataset tars: a manifest of shards and an index of samples.

    manifest.json   version, dataset fingerprint, and per shard: name, samples, bytes, sha256
    index.npy       40 bytes a sample, memory-mapped: stable id, offset, and where its image,
                    text and metadata lie behind that offset

The tars stay ordinary: any webdataset user can read them and ignore both files.
"""

import hashlib
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

import numpy as np
from jaxtyping import Int64

from vlm.data.samples import IMAGE_EXTENSIONS
from vlm.errors import DataError
from vlm.files import write_text_whole

__all__ = [
    "INDEX_DTYPE",
    "Manifest",
    "ShardInfo",
    "build_manifest",
    "indexed_shards",
    "open_manifest",
    "split_member_name",
]

FORMAT_VERSION: Final = 1
_MANIFEST: Final = "manifest.json"
_INDEX: Final = "index.npy"
_PARTS: Final = ("image", "text", "json")

INDEX_DTYPE: Final = np.dtype(
    [
        ("id", "<i8"),
        ("offset", "<u8"),
        *((f"{part}_{field}", "<u4") for part in _PARTS for field in ("start", "size")),
    ]
)
"""Of one sample; starts count from `offset`, and a size of 0 means that the part is absent."""


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar, as it was when the manifest was built."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A dataset folder, opened. Rows count samples in the order of shards and of members."""

    folder: Path
    shards: tuple[ShardInfo, ...]
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
            message = f"{self.folder}: row {row} is out of range, there are {self.num_samples}"
            raise IndexError(message)
        return int(np.searchsorted(self.ends, row, side="right")), self.index[row]


def build_manifest(folder: Path, *, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Scan every `*.tar` of a folder and write manifest and index, each whole or not at all.

    Args:
        folder: Where the shards are; sub-folders are not looked at.
        progress: Called with (shards done, shards in all).

    Raises:
        DataError: If there is no shard, or one is not a whole tar of image-text pairs; the
            message names shard, member and offset.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        message = f"{folder}: no .tar shards here; write some with `vlm data write SOURCE {folder}`"
        raise DataError(message)
    shards, parts = [], []
    for done, path in enumerate(paths, start=1):
        entries = np.array(_scan(path), dtype=INDEX_DTYPE)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        shards.append(
            ShardInfo(name=path.name, num_samples=len(entries), num_bytes=size, sha256=sha256)
        )
        parts.append(entries)
        if progress is not None:
            progress(done, len(paths))
    draft = folder / f".{_INDEX}.draft"
    with draft.open("wb") as file:
        np.save(file, np.concatenate(parts))
    draft.replace(folder / _INDEX)
    tree = {
        "version": FORMAT_VERSION,
        "fingerprint": _fingerprint(shards),
        "shards": [asdict(shard) for shard in shards],
    }
    write_text_whole(folder / _MANIFEST, json.dumps(tree, indent=1) + "\n")
    return open_manifest(folder)


def open_manifest(folder: Path) -> Manifest:
    """Open a dataset folder and check that its shards are those that were indexed.

    Raises:
        DataError: If the folder is not indexed, the index is damaged, or a shard has vanished or
            changed its size.
    """
    again = f"run `vlm data index {folder}`"
    try:
        tree = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if tree["version"] != FORMAT_VERSION:
            found = tree["version"]
            message = f"{folder}: manifest version {found}, expected {FORMAT_VERSION}; {again}"
            raise DataError(message)
        shards = tuple(ShardInfo(**shard) for shard in tree["shards"])
        index = np.load(folder / _INDEX, mmap_mode="r")
    except FileNotFoundError as error:
        message = (
            f"{folder}: not an indexed dataset, {Path(error.filename).name} is missing; {again}"
        )
        raise DataError(message) from error
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        message = f"{folder}: manifest or index is damaged ({error}); {again}"
        raise DataError(message) from error
    ends = np.cumsum([shard.num_samples for shard in shards], dtype=np.int64)
    if index.dtype != INDEX_DTYPE or len(index) != int(ends[-1]):
        message = f"{folder}: {_INDEX} does not belong to {_MANIFEST}; {again}"
        raise DataError(message)
    for shard in shards:
        _check_size(folder / shard.name, shard.num_bytes, again)
    return Manifest(
        folder=folder, shards=shards, fingerprint=tree["fingerprint"], index=index, ends=ends
    )


def indexed_shards(folder: Path) -> tuple[ShardInfo, ...]:
    """What the manifest says of the shards, unchecked; empty where it cannot be read."""
    try:
        tree = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return tuple(ShardInfo(**shard) for shard in tree["shards"])
    except (OSError, ValueError, KeyError, TypeError):
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


def _scan(path: Path) -> list[tuple[int, ...]]:
    """Index entries of one shard, in order."""
    entries: list[tuple[int, ...]] = []
    seen: set[str] = set()
    parts = ((*split_member_name(member.name), member) for member in _members(path))
    known = ((key, part, member) for key, part, member in parts if part is not None)
    for key, group in itertools.groupby(known, key=lambda item: item[0]):
        members: dict[str, tarfile.TarInfo] = {}
        for _, part, member in group:
            if part in members or key in seen:
                message = (
                    f"{path}: key {key!r} comes again at byte {member.offset}; the members of a "
                    f"sample must be adjacent and keys unique; {_mend(path)}"
                )
                raise DataError(message)
            members[part] = member
        seen.add(key)
        entries.append(_entry(path, key, members))
    if not entries:
        message = f"{path}: no samples; members must be named KEY.jpg, KEY.txt, KEY.json"
        raise DataError(message)
    return entries


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """File members of a tar, refusing one that ends early."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                if end > size:
                    message = (
                        f"{path}: truncated inside {member.name!r} at byte {member.offset}; "
                        f"the file has {size} bytes. Copy it again, or {_mend(path)}"
                    )
                    raise DataError(message)
                if member.isfile():
                    yield member
            _check_end(path, file, end)
    except tarfile.TarError as error:
        message = f"{path}: not a readable tar ({error}); copy it again, or {_mend(path)}"
        raise DataError(message) from error


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """A whole tar closes with two blocks of zeros; without them its tail may be missing."""
    file.seek(end)
    if file.read(1024).strip(b"\0") or file.tell() - end < 1024:
        message = (
            f"{path}: truncated after byte {end}: the closing blocks of a tar are missing, so "
            f"samples may be too. Copy the shard again, or {_mend(path)}"
        )
        raise DataError(message)


def split_member_name(name: str) -> tuple[str, str | None]:
    """Webdataset's split: the key ends at the first dot of the last path component."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    extension = extension.lower()
    part = "image" if extension in IMAGE_EXTENSIONS else {"txt": "text"}.get(extension)
    return str(path.parent / stem), "json" if extension == "json" else part


def _entry(path: Path, key: str, members: dict[str, tarfile.TarInfo]) -> tuple[int, ...]:
    offset = min(member.offset for member in members.values())
    for part in ("image", "text"):
        if part not in members:
            message = (
                f"{path}: sample {key!r} at byte {offset} has no {part}; it needs "
                f"{key}.{'txt' if part == 'text' else '|'.join(IMAGE_EXTENSIONS)}; {_mend(path)}"
            )
            raise DataError(message)
    digest = hashlib.blake2b(f"{path.name}/{key}".encode(), digest_size=8).digest()
    fields = [int.from_bytes(digest, "big") >> 1, offset]
    for part in _PARTS:
        member = members.get(part)
        fields += [0, 0] if member is None else [member.offset_data - offset, member.size]
    return tuple(fields)


def _mend(path: Path) -> str:
    return f"run `vlm data check {path.parent} --repair` to keep what is good"


def _fingerprint(shards: list[ShardInfo]) -> str:
    entries: list[dict[str, Any]] = [asdict(shard) for shard in shards]
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
