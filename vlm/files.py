"""Files that appear whole or not at all, and which locations are none."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["file_sha256", "is_url", "open_whole", "write_text_whole"]


def is_url(location: str) -> bool:
    """Whether a location is an address, not a path of this machine."""
    return "://" in location


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """A file under a hidden name that is synced and renamed over `path` when the block ends.

    If the block raises, the draft is removed and `path` is as it was.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text_whole(path: Path, text: str) -> None:
    """Write UTF-8 text under a hidden name, then rename it over `path`."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
