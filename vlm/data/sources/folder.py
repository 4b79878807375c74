"""Pairs from a folder of images."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from vlm.data.samples import IMAGE_EXTENSIONS, Sample
from vlm.data.sources.protocol import BadSample
from vlm.errors import DataError

__all__ = ["FolderSource", "open_folder"]


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Every image under a folder, in order of path, with its caption.

    The caption is the content of a `.txt` file of the same name, else the name of the folder that
    the image lies in, with `_` and `-` read as spaces (a folder per class).
    """

    root: Path
    names: tuple[str, ...]
    """Paths of the images below `root`."""
    renamed: dict[int, str]
    """Keys of the rows whose own would come a second time."""
    digest: str
    """Of names, sizes and times of images and captions."""

    needs_text: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.names)

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "folder",
            "path": str(self.root.resolve()),
            "samples": len(self),
            "files_sha256": self.digest,
        }

    def where(self, row: int) -> str:
        return str(self.root / self.names[row])

    def read(self, start: int, stop: int) -> Iterator[Sample | BadSample]:
        for row in range(start, stop):
            name = self.names[row]
            key = self.renamed.get(row) or _key(name)
            path = self.root / name
            try:
                yield Sample(
                    key=key,
                    image=path.read_bytes(),
                    text=_caption(path, self.root),
                    metadata={"source": name},
                )
            except OSError as error:
                yield BadSample(key=key, reason=f"cannot be read ({error.strerror})")
            except DataError as error:
                yield BadSample(key=key, reason=str(error))


def open_folder(root: Path) -> FolderSource:
    """Find the images under `root`; links to folders are not followed.

    Raises:
        DataError: If there is none.
    """
    names, digest = [], hashlib.sha256()
    for name, facts in sorted(_files(root), key=lambda item: item[0].split("/")):
        if not name.lower().endswith(".txt"):
            names.append(name)
        digest.update(f"{name}\0{facts}\n".encode("utf-8", "surrogateescape"))
    if not names:
        message = f"{root}: no images; looked for .{', .'.join(IMAGE_EXTENSIONS)} at any depth"
        raise DataError(message)
    return FolderSource(
        root=root, names=tuple(names), renamed=_renamed(names), digest=digest.hexdigest()
    )


def _files(root: Path) -> Iterator[tuple[str, str]]:
    """Images and captions under a folder, each with size and time."""
    kinds = (*IMAGE_EXTENSIONS, "txt")
    for folder, _, files in os.walk(root):
        for file in files:
            path = Path(folder, file)
            if path.suffix.lower().lstrip(".") in kinds:
                status = path.stat() if path.exists() else None
                facts = f"{status.st_size} {status.st_mtime_ns}" if status else "gone"
                yield path.relative_to(root).as_posix(), facts


def _key(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")).replace("/", "_").replace(".", "_")


def _renamed(names: list[str]) -> dict[int, str]:
    """A number for each key that others have too: of `x.jpg` beside `x.png`, `a/b` beside `a_b`."""
    taken = {_key(name) for name in names}
    seen: set[str] = set()
    renamed: dict[int, str] = {}
    for row, name in enumerate(names):
        key, number = _key(name), 2
        while key in seen:
            candidate = f"{_key(name)}_{number}"
            key, number = (key if candidate in taken else candidate), number + 1
        if key != _key(name):
            renamed[row] = key
        seen.add(key)
    return renamed


def _caption(path: Path, root: Path) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        try:
            return beside.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            message = f"{beside.name} is not UTF-8 ({error}); save it as UTF-8"
            raise DataError(message) from error
    if path.parent == root:
        message = f"no caption; put it into {beside.name}, or use one folder per class"
        raise DataError(message)
    return path.parent.name.replace("_", " ").replace("-", " ")
