"""Pairs from a folder of images."""

from collections.abc import Iterator
from pathlib import Path

from vlm.data.samples import IMAGE_EXTENSIONS, Sample
from vlm.errors import DataError

__all__ = ["read_folder"]


def read_folder(root: Path) -> Iterator[Sample]:
    """Every image under `root`, in order of path, with its caption.

    The caption is the content of a `.txt` file of the same name, else the name of the folder that
    the image lies in, with `_` and `-` read as spaces (a folder per class).

    Raises:
        DataError: If there is no image, an image right under `root` has no `.txt`, or a caption
            is not UTF-8.
    """
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    if not paths:
        message = f"{root}: no images; looked for .{', .'.join(IMAGE_EXTENSIONS)} at any depth"
        raise DataError(message)
    for path in paths:
        relative = path.relative_to(root)
        yield Sample(
            key=str(relative.with_suffix("")).replace("/", "_").replace(".", "_"),
            image=path.read_bytes(),
            text=_caption(path, root),
            metadata={"source": str(relative)},
        )


def _caption(path: Path, root: Path) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        try:
            return beside.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            message = f"{beside}: not UTF-8 ({error}); save it as UTF-8"
            raise DataError(message) from error
    if path.parent == root:
        message = f"{path}: no caption; put it into {beside.name}, or use one folder per class"
        raise DataError(message)
    return path.parent.name.replace("_", " ").replace("-", " ")
