"""Exported runtimes on disk: a folder each, whole or absent, verified when it is opened.

<cache>/<16 digits of the bundle's fingerprint>-openvino-fp32/
    runtime.json   what it was made of, and the SHA-256 of every other file
    …              the files of the runtime
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vlm.config import Config, validate_config
from vlm.errors import BundleError, ConfigError
from vlm.files import file_sha256

__all__ = ["ArtefactInfo", "artefact_folder", "default_cache", "read_artefact", "write_artefact"]

FORMAT_VERSION: Final = 1
_INFO: Final = "runtime.json"


class ArtefactInfo(Config):
    """The content of `runtime.json`."""

    format_version: int
    fingerprint: str
    """Of the bundle it computes."""
    versions: dict[str, str]
    """Of the libraries that wrote it."""
    calibration: str | None = None
    """The pairs that gave the ranges of int8."""
    files: dict[str, str]
    """SHA-256 by name."""


def default_cache(bundle: Path) -> Path:
    """Where the runtimes of a bundle are kept unless said otherwise: beside it."""
    return bundle.parent / "runtimes"


def artefact_folder(cache: Path, fingerprint: str, kind: str) -> Path:
    """Where one export of one bundle belongs."""
    return cache / f"{fingerprint[:16]}-{kind}"


def write_artefact(
    folder: Path,
    write: Callable[[Path], None],
    *,
    fingerprint: str,
    versions: dict[str, str],
    calibration: str | None = None,
) -> ArtefactInfo:
    """Have `write` fill a hidden folder, describe it, and rename it to `folder`.

    Raises:
        BundleError: If the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        message = (
            f"{folder.parent}: runtimes cannot be written here ({error.strerror}); name another "
            f"folder, or export them where the bundle is made: vlm export BUNDLE --runtime openvino"
        )
        raise BundleError(message) from error
    try:
        write(draft)
        info = ArtefactInfo(
            format_version=FORMAT_VERSION,
            fingerprint=fingerprint,
            versions=versions,
            calibration=calibration,
            files={path.name: file_sha256(path) for path in sorted(draft.iterdir())},
        )
        text = json.dumps(info.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
        (draft / _INFO).write_text(text, encoding="utf-8")
        draft.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        draft.replace(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return info


def read_artefact(folder: Path, *, fingerprint: str) -> ArtefactInfo:
    """Read what an export says of itself, and verify every file of it.

    Raises:
        BundleError: If it is missing, damaged, altered or made of another bundle.
    """
    path = folder / _INFO
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        info = validate_config(ArtefactInfo, tree, source=str(path))
        found = {name: file_sha256(folder / name) for name in info.files}
    except OSError as error:
        message = f"{folder}: no exported runtime, cannot read {error.filename} ({error.strerror})"
        raise BundleError(message) from error
    except (ValueError, ConfigError) as error:
        message = f"{path}: damaged ({error}); remove the folder and export the runtime again"
        raise BundleError(message) from error
    if info.format_version != FORMAT_VERSION or info.fingerprint != fingerprint:
        message = (
            f"{folder}: made of bundle {info.fingerprint[:12]} in format {info.format_version}, "
            f"asked for {fingerprint[:12]} in {FORMAT_VERSION}; export the runtime again"
        )
        raise BundleError(message)
    altered = [name for name, digest in info.files.items() if found[name] != digest]
    if altered:
        message = f"{folder}: {', '.join(altered)} altered since export; export the runtime again"
        raise BundleError(message)
    return info
