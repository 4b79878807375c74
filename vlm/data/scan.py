"""One shard to its index entries: where each sample lies, and what it is."""

import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

import numpy as np

from vlm.data.samples import IMAGE_EXTENSIONS, hash_text
from vlm.errors import DataError

__all__ = [
    "DAMAGED_FOLDER",
    "INDEX_DTYPE",
    "PARTS",
    "sample_id",
    "scan_shard",
    "shard_paths",
    "split_member_name",
]

DAMAGED_FOLDER: Final = "damaged"
"""Where `vlm data check --repair` keeps what it replaced; no part of the dataset."""

PARTS: Final = ("image", "text", "json")

INDEX_DTYPE: Final = np.dtype(
    [
        ("id", "<i8"),
        ("offset", "<u8"),
        *((f"{part}_{field}", "<u4") for part in PARTS for field in ("start", "size")),
    ]
)
"""Of one sample; starts count from `offset`, and a size of 0 means that the part is absent."""


# Captions may be in the metadata; see `captions.py`.
_NEEDED: Final = (
    ({"image"}, IMAGE_EXTENSIONS),
    ({"text", "json", "label"}, ("txt", "json", "cls")),
)


def shard_paths(folder: Path) -> dict[str, Path]:
    """Every tar of a folder, at any depth, by its name relative to the folder; in order of names.

    Hidden folders and files are drafts, and what a repair put aside is not looked at.
    """
    found = []
    for place, folders, files in os.walk(folder):
        top = Path(place) == folder
        folders[:] = [
            name for name in folders if name[0] != "." and not (top and name == DAMAGED_FOLDER)
        ]
        found += [Path(place) / n for n in files if n[0] != "." and n.lower().endswith(".tar")]
    named = {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}
    return dict(sorted(named.items()))


def scan_shard(folder: Path, name: str) -> np.ndarray:
    """Entries of `INDEX_DTYPE` of one tar of a folder, in order.

    Raises:
        DataError: If it is not a whole tar of image-text pairs; the message names shard, member
            and offset.
    """
    return np.array(_entries(folder, name), dtype=INDEX_DTYPE)


def sample_id(shard: str, key: str) -> int:
    """The stable 63-bit id of a sample: a hash of the shard's name and the key."""
    return hash_text(f"{shard}/{key}") >> 1


def _entries(folder: Path, name: str) -> list[tuple[int, ...]]:
    """Index entries of one shard, in order."""
    path = folder / name
    mend = f"run `vlm data check {folder} --repair` to keep what is good"
    entries: list[tuple[int, ...]] = []
    seen: set[str] = set()
    parts = ((*split_member_name(member.name), member) for member in _members(path, mend))
    known = ((key, part, member) for key, part, member in parts if part is not None)
    for key, group in itertools.groupby(known, key=lambda item: item[0]):
        members: dict[str, tarfile.TarInfo] = {}
        for _, part, member in group:
            if part in members or key in seen:
                message = (
                    f"{path}: key {key!r} comes again at byte {member.offset}; the members of a "
                    f"sample must be adjacent and keys unique; {mend}"
                )
                raise DataError(message)
            members[part] = member
        seen.add(key)
        try:
            entries.append(_entry(sample_id(name, key), key, members))
        except DataError as error:
            message = f"{path}: {error}; {mend}"
            raise DataError(message) from error
    if not entries:
        message = (
            f"{path}: no samples; members must be named KEY.jpg, KEY.txt, KEY.json, where KEY ends "
            f"at the first dot"
        )
        raise DataError(message)
    return entries


def _members(path: Path, mend: str) -> Iterator[tarfile.TarInfo]:
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
                        f"the file has {size} bytes. Copy it again, or {mend}"
                    )
                    raise DataError(message)
                if member.isfile():
                    yield member
            _check_end(path, file, end, mend)
    except tarfile.TarError as error:
        message = f"{path}: not a readable tar ({error}); copy it again, or {mend}"
        raise DataError(message) from error


def _check_end(path: Path, file: BinaryIO, end: int, mend: str) -> None:
    """A whole tar closes with two blocks of zeros; without them its tail may be missing."""
    file.seek(end)
    if file.read(1024).strip(b"\0") or file.tell() - end < 1024:
        message = (
            f"{path}: truncated after byte {end}: the closing blocks of a tar are missing, so "
            f"samples may be too. Copy the shard again, or {mend}"
        )
        raise DataError(message)


def split_member_name(name: str) -> tuple[str, str | None]:
    """Webdataset's split: the key ends at the first dot of the last path component."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    extension = extension.lower()
    other = {"txt": "text", "json": "json", "cls": "label"}.get(extension)
    return str(path.parent / stem), "image" if extension in IMAGE_EXTENSIONS else other


def _entry(number: int, key: str, members: dict[str, tarfile.TarInfo]) -> tuple[int, ...]:
    offset = min(member.offset for member in members.values())
    for parts, extensions in _NEEDED:
        if not members.keys() & parts:
            message = (
                f"sample {key!r} at byte {offset} has no {' or '.join(sorted(parts))}; "
                f"it needs {key}.{'|'.join(extensions)}"
            )
            raise DataError(message)
    if "label" in members:  # a number is JSON too; see `decode_text_and_metadata`
        members.setdefault("json", members["label"])
    fields = [number, offset]
    for part in PARTS:
        member = members.get(part)
        fields += [0, 0] if member is None else [member.offset_data - offset, member.size]
    return tuple(fields)
