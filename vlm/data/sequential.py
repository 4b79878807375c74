"""Whole datasets in order: for evaluation and indexing."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlm.data.dataset import open_reader
from vlm.data.remote import RemoteConfig
from vlm.data.samples import Sample
from vlm.errors import DataError

__all__ = ["iterate_samples"]

_BLOCK = 65_536


def iterate_samples(location: Path | str) -> Iterator[Sample]:
    """Every sample of a dataset, shard by shard, undecoded.

    Args:
        location: A folder, or the URL of one in an object store.

    Raises:
        DataError: If it is not an intact dataset, or a sample cannot be read or has no `.txt`.
        StoreError: If a remote store does not answer.
    """
    reader, _ = open_reader(str(location), remote=RemoteConfig())
    with reader:
        for start in range(0, reader.num_samples, _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, reader.num_samples), dtype=np.int64)
            for row in reader.in_order(rows):
                if not reader.manifest.index[row]["text_size"]:
                    message = f"{reader.where(row)}: sample {reader.name(row)[1]!r} has no .txt"
                    raise DataError(message)
                yield reader.read(row)
