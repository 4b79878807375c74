"""Whole datasets in order, streamed by the webdataset package: for evaluation and indexing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from webdataset import tariterators

from vlm.data.manifest import open_manifest
from vlm.data.samples import IMAGE_EXTENSIONS, Sample, decode_text_and_metadata
from vlm.errors import DataError

__all__ = ["iterate_samples"]


def iterate_samples(folder: Path) -> Iterator[Sample]:
    """Every sample of a dataset folder, shard by shard, undecoded.

    Raises:
        DataError: If the folder is not an intact dataset, or a sample cannot be read; webdataset
            by itself would end early at some kinds of damage, so counts are checked.
    """
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
