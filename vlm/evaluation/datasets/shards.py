"""Pairs in shards that `vlm data` wrote or indexed, in a folder or an object store."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from vlm.config import Config
from vlm.data.dataset import open_reader
from vlm.data.remote import RemoteConfig
from vlm.errors import DataError
from vlm.evaluation.datasets.opened import Item, OpenedDataset

__all__ = ["ShardsDataset"]


class ShardsDataset(Config):
    """A dataset of shards."""

    type: Literal["shards"] = "shards"
    location: str
    """A folder, relative to the current one, or the URL of one."""
    filter: str | None = None
    """Name of a filter that `vlm data filter` wrote; only what it keeps is evaluated."""
    captions_field: str | None = None
    """Key in a sample's `.json` with a list of captions, all of which count; none: its `.txt`."""
    max_pairs: int | None = None
    """Most pairs: those with the lowest sample ids, which are hashes and so even over shards."""

    def open(self) -> OpenedDataset:
        """Open the index.

        Raises:
            DataError: If there is no intact dataset.
            StoreError: If a remote store does not answer.
        """
        reader, _ = open_reader(self.location, remote=RemoteConfig(), filter_name=self.filter)
        rows = np.arange(reader.num_samples)
        if self.max_pairs is not None and self.max_pairs < len(rows):
            rows = np.sort(np.argsort(reader.sample_ids(rows), kind="stable")[: self.max_pairs])

        def read(start: int, stop: int) -> Iterator[Item]:
            chosen = rows[start:stop]
            reader.expect(chosen)
            for row in chosen.tolist():
                sample = reader.read(row)
                yield Item(
                    key=sample.key,
                    image=sample.image,
                    texts=self._texts(sample.key, sample.text, sample.metadata),
                    metadata=sample.metadata,
                )

        return OpenedDataset(location=self.location, count=len(rows), read=read, close=reader.close)

    def _texts(self, key: str, text: str, metadata: dict[str, Any]) -> tuple[str, ...]:
        if self.captions_field is None:
            return (text,)
        found = metadata.get(self.captions_field)
        if not isinstance(found, list) or not found or not all(isinstance(t, str) for t in found):
            message = (
                f"{self.location}: sample {key!r} has no list of captions in "
                f"{self.captions_field!r}, found {found!r}; its .json has: "
                f"{', '.join(sorted(metadata)) or 'none'}"
            )
            raise DataError(message)
        return tuple(found)
