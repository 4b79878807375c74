"""What a folder of the embedded store says of itself: whose vectors it holds."""

import json
from pathlib import Path
from typing import Any

from serving.errors import FingerprintError, ServingError, StoreUnavailableError
from serving.stores.base import CollectionInfo
from serving.stores.catalog import replace_whole

__all__ = ["claim_folder", "holds_collection", "made", "read_collection_info"]

_INFO = "collection.json"
_FORMAT = 2


def holds_collection(folder: Path) -> bool:
    """Whether a folder holds one, damaged or not."""
    return (folder / _INFO).is_file()


def made(folder: Path) -> tuple[int, int] | None:
    """What tells a collection from one that is made in its place later; None if there is none."""
    try:
        found = (folder / _INFO).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def read_collection_info(folder: Path) -> CollectionInfo | None:
    """What a folder holds; None if it is no collection.

    Raises:
        StoreUnavailableError: If it was one and is damaged.
    """
    try:
        tree = _read_info(folder)
    except FileNotFoundError:
        return None
    return CollectionInfo(fingerprint=tree["fingerprint"], dim=tree["dim"])


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / _INFO
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**tree, "fingerprint": str(tree["fingerprint"]), "dim": int(tree["dim"])}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}: damaged; restore a copy, or remove the collection"
        raise StoreUnavailableError(message) from error


def claim_folder(folder: Path, fingerprint: str, dim: int) -> None:
    """Write whose vectors a new folder holds, or check it for an old one.

    Raises:
        FingerprintError: If it holds another model's.
        ServingError: If an earlier version made it.
        StoreUnavailableError: If what it says is damaged.
    """
    if not holds_collection(folder):
        told = {"format": _FORMAT, "fingerprint": fingerprint, "dim": dim}
        replace_whole(folder / _INFO, json.dumps(told))
        return
    info = _read_info(folder)
    found = info["fingerprint"]
    if found != fingerprint:
        message = (
            f"{folder}: holds vectors of model {found[:12]}, and this is model "
            f"{fingerprint[:12]}; similarities between models mean nothing. Index the data again "
            f"into another folder, or serve the bundle that this index was made with"
        )
        raise FingerprintError(message)
    if info.get("format") != _FORMAT:
        message = (
            f"{folder}: was made by another version of this program (format "
            f"{info.get('format', 1)}, this is {_FORMAT}); index the data again into another folder"
        )
        raise ServingError(message)
