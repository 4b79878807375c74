"""Bundles to and from object stores: `s3://`, `gs://`, `az://`, `https://`, or a folder.

Credentials and endpoints come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`,
`GOOGLE_APPLICATION_CREDENTIALS`, …), which the obstore package reads. Nothing is believed: a
bundle that was fetched appears under its name only when its files have the promised fingerprint.
"""

import json
import re
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Final

import obstore
import obstore.exceptions
import obstore.store
from obstore.store import ObjectStore

from vlm.data.cache import locked
from vlm.errors import BundleError, StoreError
from vlm.files import is_url
from vlm.inference.bundle import BundleInfo, bundle_files, read_bundle_info, verify_bundle

__all__ = ["cached_bundle", "fetch_bundle", "push_bundle", "stored_bundles"]

_DESCRIPTION: Final = "bundle.json"
_ATTEMPTS: Final = 8
_TIMEOUT: Final = timedelta(minutes=10)
_MISSING: Final = (FileNotFoundError, obstore.exceptions.NotFoundError)


def fetch_bundle(source: str, folder: Path, *, fingerprint: str | None = None) -> BundleInfo:
    """Copy a bundle into `folder`, which appears whole and verified, or not at all.

    A folder that holds the bundle already is verified and left as it is.

    Args:
        source: Where it is: a URL or a folder.
        folder: Where it goes; must not hold anything else.
        fingerprint: What it must have, all 64 hex digits; by default what its description says.

    Raises:
        BundleError: If there is no bundle, or not the one asked for, or its files were altered.
        StoreError: If the store does not answer.
    """
    if (folder / _DESCRIPTION).is_file():
        return _expected(verify_bundle(folder), fingerprint, str(folder))
    if folder.exists() and any(folder.iterdir()):
        message = f"{folder}: holds other files; choose an empty folder, or one that is not there"
        raise BundleError(message)
    store = _open(source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _download(store, source, _DESCRIPTION, draft)
        info = _expected(read_bundle_info(draft), fingerprint, source)
        for name in bundle_files(info)[:-1]:
            _download(store, source, name, draft)
        verify_bundle(draft)
        draft.chmod(0o755)
        if folder.exists():
            folder.rmdir()  # it is empty
        draft.replace(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return info


def cached_bundle(source: str, cache: Path) -> Path:
    """The folder of a bundle of a store, fetched once by whichever process comes first.

    What lies in the cache is named by fingerprint, and verified each time.

    Args:
        source: URL of the bundle.
        cache: Folder of all bundles that were fetched; made if it is missing.

    Raises:
        BundleError: If there is no intact bundle.
        StoreError: If the store does not answer.
    """
    cache.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint_at(_open(source), source)
    if fingerprint is None or not re.fullmatch("[0-9a-f]{64}", fingerprint):
        message = f"{source}: no bundle is there ({_DESCRIPTION} with a fingerprint); push one"
        raise BundleError(message)
    folder = cache / fingerprint[:16] / "bundle"
    with locked(cache / f".{fingerprint[:16]}.lock"):
        fetch_bundle(source, folder, fingerprint=fingerprint)
    return folder


def stored_bundles(prefix: str) -> list[str]:
    """Names of the bundles right under a URL, in order.

    Raises:
        BundleError: If no store can be opened there.
        StoreError: If the store does not answer.
    """
    store = _open(prefix)
    try:
        found = obstore.list_with_delimiter(store)["common_prefixes"]
        names = sorted(path.strip("/").rsplit("/", 1)[-1] for path in found)
        return [name for name in names if _has_bundle(store, name)]
    except (obstore.exceptions.BaseError, OSError) as error:
        raise _unreachable(prefix, "", error) from error


def _has_bundle(store: ObjectStore, name: str) -> bool:
    try:
        obstore.head(store, f"{name}/{_DESCRIPTION}")
    except _MISSING:
        return False
    return True


def push_bundle(folder: Path, target: str) -> BundleInfo:
    """Copy a bundle to a URL, its description last, so that what can be read is whole.

    Pushing the same bundle again repairs a push that was interrupted.

    Raises:
        BundleError: If the folder is no intact bundle, or another bundle is there.
        StoreError: If the store does not answer.
    """
    info = verify_bundle(folder)
    store = _open(target)
    there = _fingerprint_at(store, target)
    if there not in (None, info.fingerprint):
        message = (
            f"{target}: holds bundle {str(there)[:12]}, which servers may have been told to fetch; "
            f"push {info.fingerprint[:12]} under another name"
        )
        raise BundleError(message)
    for name in bundle_files(info):
        try:
            obstore.put(store, name, folder / name)
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _unreachable(target, name, error) from error
    return info


def _expected(info: BundleInfo, fingerprint: str | None, where: str) -> BundleInfo:
    if fingerprint is not None and info.fingerprint != fingerprint:
        message = (
            f"{where}: is bundle {info.fingerprint}, and {fingerprint} was asked for; "
            f"correct the address or the fingerprint"
        )
        raise BundleError(message)
    return info


def _open(url: str) -> ObjectStore:
    if not is_url(url):
        return obstore.store.LocalStore(Path(url).absolute(), mkdir=True)
    try:
        return obstore.store.from_url(
            url.rstrip("/"),
            # Plain HTTP is used where the URL, or the endpoint in the environment, says so.
            client_options={"timeout": _TIMEOUT, "allow_http": True},
            retry_config={"max_retries": _ATTEMPTS - 1, "retry_timeout": _TIMEOUT},
        )
    except (obstore.exceptions.BaseError, ValueError) as error:
        message = f"{url}: no store can be opened there ({_first_line(error)})"
        raise BundleError(message) from error


def _download(store: ObjectStore, source: str, name: str, folder: Path) -> None:
    try:
        with (folder / name).open("wb") as file:
            for block in obstore.get(store, name).stream():
                file.write(block)
    except _MISSING as error:
        message = f"{source}: no intact bundle, {name} is missing; push it again"
        raise BundleError(message) from error
    except obstore.exceptions.BaseError as error:
        raise _unreachable(source, name, error) from error


def _fingerprint_at(store: ObjectStore, target: str) -> str | None:
    """Of the bundle that is there, or none."""
    try:
        return str(json.loads(bytes(obstore.get(store, _DESCRIPTION).bytes()))["fingerprint"])
    except _MISSING:
        return None
    except (ValueError, KeyError, TypeError):
        return "of no known form"
    except obstore.exceptions.BaseError as error:
        raise _unreachable(target, _DESCRIPTION, error) from error


def _unreachable(url: str, name: str, error: Exception) -> StoreError:
    return StoreError(
        f"{url}/{name}: the store failed ({_first_line(error)}). Check the address, the "
        f"credentials in the environment and the network, then run the same command again"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
