"""Samples to webdataset shards, each whole or absent."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import webdataset

from vlm.data.samples import Sample
from vlm.errors import DataError
from vlm.files import open_whole

__all__ = ["image_extension", "write_shards"]

_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))


def write_shards(
    samples: Iterable[Sample], folder: Path, *, prefix: str, samples_per_shard: int = 1000
) -> list[Path]:
    """Write `PREFIX-000000.tar`, … into a folder; equal samples give equal bytes.

    A shard is written under a hidden name and renamed when it is complete and on disk.

    Args:
        samples: In the order in which they shall lie.
        folder: Made if it is missing.
        prefix: What shard names start with.
        samples_per_shard: At least 1.

    Returns:
        The shards, in order. Follow with `build_manifest` once the folder is complete.

    Raises:
        DataError: If a key is empty or holds a dot or slash at a place where webdataset would
            split it, or an image is neither JPEG, PNG nor WebP.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    iterator = iter(samples)
    for number in itertools.count():
        chunk = list(itertools.islice(iterator, samples_per_shard))
        if not chunk:
            return paths
        path = folder / f"{prefix}-{number:06d}.tar"
        _write_shard(chunk, path)
        paths.append(path)
    raise AssertionError


def image_extension(data: bytes) -> str:
    """`jpg`, `png` or `webp`, by content.

    Raises:
        DataError: If it is none of them.
    """
    for magic, extension in _MAGIC:
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    message = f"not a JPEG, PNG or WebP file, it starts with {data[:8]!r}"
    raise DataError(message)


def _write_shard(samples: list[Sample], path: Path) -> None:
    # Fixed owner and time make the bytes a function of the samples.
    with (
        open_whole(path) as file,
        webdataset.TarWriter(file, mtime=0, user="vlm", group="vlm") as writer,
    ):
        for sample in samples:
            writer.write(_members(sample))


def _members(sample: Sample) -> dict[str, object]:
    if not sample.key or "." in sample.key or sample.key.startswith("/"):
        message = f"sample key {sample.key!r}: must not be empty, absolute, or contain a dot"
        raise DataError(message)
    try:
        extension = image_extension(sample.image)
    except DataError as error:
        message = f"sample {sample.key!r}: {error}"
        raise DataError(message) from error
    metadata = json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False)
    return {
        "__key__": sample.key,
        extension: sample.image,
        "txt": sample.text.encode(),
        "json": metadata.encode(),
    }
