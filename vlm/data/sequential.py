"""Whole datasets in order, streamed by the webdataset package: for evaluation and indexing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from webdataset import tariterators

from vlm.data.dataset import open_reader
from vlm.data.manifest import open_manifest
from vlm.data.remote import RemoteConfig, is_url
from vlm.data.samples import IMAGE_EXTENSIONS, Sample, decode_text_and_metadata
from vlm.errors import DataError

__all__ = ["iterate_samples"]

_RUNS_AHEAD = 8


def iterate_samples(location: Path | str) -> Iterator[Sample]:
    """Every sample of a dataset, shard by shard, undecoded.

    Args:
        location: A folder, or the URL of one in an object store.

    Raises:
        DataError: If the folder is not an intact dataset, or a sample cannot be read; webdataset
            by itself would end early at some kinds of damage, so counts are checked.
        StoreError: If a remote store does not answer.
    """
    if is_url(str(location)):
        yield from _iterate_remote(str(location))
    else:
        yield from _iterate_local(Path(location))


def _iterate_remote(url: str) -> Iterator[Sample]:
    reader, run_length = open_reader(url, remote=RemoteConfig())
    with reader:
        for row in range(reader.num_samples):
            if row % run_length == 0:
                ahead = np.arange(row, row + _RUNS_AHEAD * run_length, run_length)
                reader.expect(ahead[ahead < reader.num_samples])
            yield reader.read(row)


def _iterate_local(folder: Path) -> Iterator[Sample]:
    manifest = open_manifest(folder)
    for shard in manifest.shards:
        path = folder / shard.name
        count = 0
        # webdataset's WebDataset leaves shards open; its stages work on a file of ours as well.
        with path.open("rb") as file:
            source = [{"url": str(path), "stream": file}]
            members = tariterators.tar_file_expander(source, handler=_reraise)
            for sample in tariterators.group_by_keys(members, handler=_reraise):
                count += 1
                yield _sample(path, sample)
        if count != shard.num_samples:
            message = (
                f"{path}: {count} samples were read and {shard.num_samples} indexed; "
                f"run `vlm data index {folder}`"
            )
            raise DataError(message)


def _sample(path: Path, members: dict[str, Any]) -> Sample:
    key = str(members["__key__"])
    image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
    if image is None or "txt" not in members:
        message = f"{path}: sample {key!r} has no image or no .txt"
        raise DataError(message)
    try:
        text, metadata = decode_text_and_metadata(members["txt"], members.get("json", b"{}"))
    except ValueError as error:
        message = f"{path}: sample {key!r}: {error}"
        raise DataError(message) from error
    return Sample(key=key, image=image, text=text, metadata=metadata)


def _reraise(error: Exception) -> NoReturn:
    message = f"a shard cannot be read ({error}); copy or write it again"
    raise DataError(message) from error
