"""Samples to webdataset shards, each whole or absent."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import webdataset

from vlm.data.samples import Sample
from vlm.errors import DataError
from vlm.files import open_whole

__all__ = ["image_extension", "sample_members", "shard_name", "write_shard", "write_shards"]

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
        DataError: If a sample cannot be stored; see `sample_members`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    iterator = iter(samples)
    for number in itertools.count():
        chunk = list(itertools.islice(iterator, samples_per_shard))
        if not chunk:
            return paths
        path = folder / shard_name(prefix, number)
        write_shard(path, map(sample_members, chunk))
        paths.append(path)
    raise AssertionError


def shard_name(prefix: str, number: int) -> str:
    """The file name of a shard; in order of names up to a million."""
    return f"{prefix}-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[dict[str, object]]) -> None:
    """Write one shard, whole or not at all.

    Args:
        path: Where it appears once it is complete and on disk.
        samples: From `sample_members`; each is written before the next is asked for.
    """
    # Fixed owner and time make the bytes a function of the samples.
    with (
        open_whole(path) as file,
        webdataset.TarWriter(file, mtime=0, user="vlm", group="vlm") as writer,
    ):
        for members in samples:
            writer.write(members)


def sample_members(sample: Sample) -> dict[str, object]:
    """The members of a sample in a tar, by extension.

    Raises:
        DataError: If the key is empty, absolute, leads out of a folder that it is unpacked into,
            or holds a dot where webdataset would split it; if the image is neither JPEG, PNG nor
            WebP; or a text has no UTF-8 form.
    """
    key = sample.key
    path = PurePosixPath(key)
    if not key or "." in path.name or path.is_absolute() or ".." in path.parts:
        message = f"sample key {key!r}: must not be empty, absolute, lead out, or contain a dot"
        raise DataError(message)
    metadata = json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False)
    try:
        return {
            "__key__": key,
            image_extension(sample.image): sample.image,
            **({"txt": sample.text.encode()} if sample.text else {}),
            "json": metadata.encode(),
        }
    except (DataError, UnicodeEncodeError) as error:
        message = f"sample {key!r}: {error}"
        raise DataError(message) from error


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
