"""Shards in the layout of CLIP_benchmark, with labels or with lists of captions.

classnames.txt                             one class a line, its number is the line's
zeroshot_classification_templates.txt      prompts with {c} for the class
dataset_type.txt                           `retrieval` where .txt holds captions, one a line
test/*.tar                                 members KEY.jpg (webp, png) with KEY.cls or KEY.txt
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from vlm.config import Config
from vlm.data.samples import IMAGE_EXTENSIONS
from vlm.errors import DataError
from vlm.evaluation.datasets.opened import ClassFacts, Item, OpenedDataset, bad_sample

__all__ = ["ClipBenchmarkDataset"]


@dataclass(frozen=True, kw_only=True)
class _Row:
    shard: Path
    key: str
    image: tuple[int, int]
    """Offset and size in the shard."""
    note: bytes
    """The content of `.cls` or `.txt`."""


class ClipBenchmarkDataset(Config):
    """A folder as `clip_benchmark_export_wds` writes it."""

    type: Literal["clip_benchmark"] = "clip_benchmark"
    location: Path
    split: str = "test"

    def open(self) -> OpenedDataset:
        """Read the headers of all shards.

        Raises:
            DataError: If there are no shards, or a sample lacks its image, label or captions.
        """
        retrieval = self._lines("dataset_type.txt") == ["retrieval"]
        names = self._lines("classnames.txt")
        templates = self._lines("zeroshot_classification_templates.txt")
        shards = sorted((self.location / self.split).glob("*.tar"), key=_natural)
        if not shards:
            message = f"{self.location}: no shards; looked for {self.split}/*.tar"
            raise DataError(message)
        if not retrieval and names is None:
            message = (
                f"{self.location}: no classnames.txt, and dataset_type.txt does not say "
                f"`retrieval`; one of the two is needed"
            )
            raise DataError(message)
        rows = [row for shard in shards for row in _scan(shard, "txt" if retrieval else "cls")]

        def read(start: int, stop: int) -> Iterator[Item]:
            for row in rows[start:stop]:
                yield _item(row, names)

        facts = None
        if names is not None and not retrieval:
            filled = tuple(t.replace("{c}", "{}") for t in templates or ()) or None
            facts = ClassFacts(class_field="class", names=tuple(names), templates=filled)
        return OpenedDataset(location=str(self.location), count=len(rows), read=read, classes=facts)

    def _lines(self, name: str) -> list[str] | None:
        path = self.location / name
        if not path.is_file():
            return None
        return [line.strip() for line in path.read_text(encoding="utf-8").strip().splitlines()]


def _natural(shard: Path) -> tuple[int, str]:
    return (int(shard.stem) if shard.stem.isdecimal() else -1, shard.name)


def _scan(shard: Path, note: str) -> Iterator[_Row]:
    """The rows of one shard, in order of their first members."""
    images: dict[str, tuple[int, int]] = {}
    notes: dict[str, bytes] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                key, extension = str(path.parent / stem), extension.lower()
                if extension in IMAGE_EXTENSIONS:
                    images[key] = (member.offset_data, member.size)
                elif extension == note and (file := tar.extractfile(member)) is not None:
                    notes[key] = file.read()
    except (tarfile.TarError, OSError) as error:
        message = f"{shard}: not a whole tar ({error}); copy it again"
        raise DataError(message) from error
    for key, image in images.items():
        if key not in notes:
            raise bad_sample(str(shard), key, f"has no .{note}")
        yield _Row(shard=shard, key=key, image=image, note=notes[key])


def _item(row: _Row, names: list[str] | None) -> Item:
    with row.shard.open("rb") as file:
        file.seek(row.image[0])
        image = file.read(row.image[1])
    try:
        text = row.note.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise bad_sample(
            str(row.shard), row.key, f"has a text that is no UTF-8 ({error})"
        ) from error
    if names is None:
        captions = tuple(line.strip() for line in text.split("\n"))
        if not all(captions):
            raise bad_sample(str(row.shard), row.key, f"has an empty caption: {text!r}")
        return Item(key=row.key, image=image, texts=captions)
    if not text.isdecimal() or int(text) >= len(names):
        raise bad_sample(
            str(row.shard), row.key, f"has label {text!r}, allowed are 0 to {len(names) - 1}"
        )
    number = int(text)
    return Item(key=row.key, image=image, texts=(names[number],), metadata={"class": number})
