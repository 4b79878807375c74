"""Pairs from a folder of shards, to be sharded anew."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vlm.data.location import open_location
from vlm.data.manifest import Manifest
from vlm.data.plan import usual_run_length
from vlm.data.reader import Reader
from vlm.data.remote import RemoteConfig
from vlm.data.samples import Sample
from vlm.data.sources.protocol import BadSample
from vlm.errors import DataError
from vlm.files import is_url

__all__ = ["ShardsSource"]


class ShardsSource:
    """The samples of an indexed folder of webdataset tars, whoever wrote them; or of a URL.

    Keys, captions and metadata stay. A key may lie in two source shards; where both come into one
    `read`, the later gets the stem of its source shard in front.

    Raises:
        DataError: If the folder is not indexed, or has changed since.
    """

    needs_text = False

    def __init__(self, location: Path | str) -> None:
        self.location = str(location)
        self._manifest: Manifest
        self._manifest, self._shards = open_location(self.location, RemoteConfig())

    def __reduce__(self) -> tuple[type["ShardsSource"], tuple[str]]:
        # A worker maps the index itself; pickled, it would be copied into every one.
        return ShardsSource, (self.location,)

    def __len__(self) -> int:
        return self._manifest.num_samples

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "shards",
            "path": self.location if is_url(self.location) else str(Path(self.location).resolve()),
            "samples": len(self),
            "fingerprint": self._manifest.fingerprint,
        }

    def where(self, row: int) -> str:
        shard, _ = self._manifest.locate(row)
        return self._manifest.where(shard)

    def read(self, start: int, stop: int) -> Iterator[Sample | BadSample]:
        seen: set[str] = set()
        remote = is_url(self.location)
        length = usual_run_length(len(self), remote=remote)
        with Reader(self._manifest, shards=self._shards, run_length=length) as reader:
            for row in reader.in_order(np.arange(start, stop, dtype=np.int64)):
                try:
                    sample = reader.read(row)
                except DataError as error:
                    yield BadSample(key=reader.name(row)[1], reason=str(error))
                    continue
                if not sample.text and self._manifest.index[row]["text_size"]:
                    yield BadSample(key=sample.key, reason="its caption is empty")
                    continue
                key = self._free_key(row, sample.key, seen)
                seen.add(key)
                yield replace(sample, key=key)

    def _free_key(self, row: int, key: str, seen: set[str]) -> str:
        shard, _ = self._manifest.locate(row)
        stem = PurePosixPath(self._manifest.where(shard)).stem.replace(".", "_")
        while key in seen:
            key = f"{stem}_{key}"
        return key
