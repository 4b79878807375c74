"""Pairs from a folder of shards, to be sharded anew."""

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.data.manifest import MANIFEST_NAME, Manifest, open_manifest
from vlm.data.reader import Reader
from vlm.data.samples import Sample
from vlm.data.scan import split_member_name
from vlm.data.sources.protocol import BadSample
from vlm.errors import DataError

__all__ = ["ShardsSource", "holds_shards"]

_NO_KEY = "?"


def holds_shards(folder: Path) -> bool:
    """Whether a folder is a set of shards, indexed or not."""
    return (folder / MANIFEST_NAME).is_file() or any(folder.glob("*.tar"))


class ShardsSource:
    """The samples of an indexed folder of webdataset tars, whoever wrote them.

    Keys, captions and metadata stay. A key may lie in two source shards; where both come into one
    `read`, the later gets the stem of its source shard in front.

    Raises:
        DataError: If the folder is not indexed, or has changed since.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifest: Manifest = open_manifest(folder)

    def __reduce__(self) -> tuple[type["ShardsSource"], tuple[Path]]:
        # A worker maps the index itself; pickled, it would be copied into every one.
        return ShardsSource, (self.folder,)

    def __len__(self) -> int:
        return self._manifest.num_samples

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "shards",
            "path": str(self.folder.resolve()),
            "samples": len(self),
            "fingerprint": self._manifest.fingerprint,
        }

    def where(self, row: int) -> str:
        shard, _ = self._manifest.locate(row)
        return self._manifest.where(shard)

    def read(self, start: int, stop: int) -> Iterator[Sample | BadSample]:
        seen: set[str] = set()
        with Reader(self._manifest) as reader:
            for row in range(start, stop):
                try:
                    sample = reader.read(row)
                except DataError as error:
                    yield BadSample(key=reader.name(row)[1], reason=str(error))
                    continue
                key = self._free_key(row, sample.key, seen)
                seen.add(key)
                yield replace(sample, key=key)

    def _free_key(self, row: int, key: str, seen: set[str]) -> str:
        shard, entry = self._manifest.locate(row)
        path = Path(self._manifest.where(shard))
        if key == _NO_KEY:
            key = _long_key(path, int(entry["offset"]))
        while key in seen:
            key = f"{path.stem.replace('.', '_')}_{key}"
        return key


def _long_key(path: Path, offset: int) -> str:
    """The key of a sample whose name is too long, or not plain enough, for one tar header."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                member = tar.next()
    except (OSError, tarfile.TarError) as error:
        message = f"{path}: no tar header at byte {offset} ({error}); index the folder again"
        raise DataError(message) from error
    return _NO_KEY if member is None else split_member_name(member.name)[0]
