"""A dataset by its location, a folder or a URL: opened, and read by many processes."""

import functools
from pathlib import Path

from vlm.data.manifest import Manifest, open_manifest
from vlm.data.plan import usual_run_length
from vlm.data.reader import Reader
from vlm.data.remote import RemoteConfig, open_remote
from vlm.data.shards import LocalShards, ShardBytes
from vlm.errors import DataError
from vlm.files import is_url

__all__ = ["job_reader", "local_folder", "open_location"]


def open_location(location: str, remote: RemoteConfig) -> tuple[Manifest, ShardBytes]:
    """The manifest of a dataset, and where the bytes of its shards come from.

    Raises:
        DataError: If there is no intact dataset.
        StoreError: If a remote store does not answer.
    """
    if is_url(location):
        return open_remote(location, remote)
    manifest = open_manifest(Path(location))
    return manifest, LocalShards(manifest)


@functools.lru_cache(maxsize=1)
def job_reader(location: str, fingerprint: str, run_length: int | None = None) -> Reader:
    """A reader for one job of many, opened once a process: a dataset may list a million shards.

    Args:
        location: A folder or a URL.
        fingerprint: Of the dataset when the work began.
        run_length: Neighbours fetched together; by default what suits reading all of them.

    Raises:
        DataError: If it has been indexed anew since.
    """
    manifest, shards = open_location(location, RemoteConfig())
    if manifest.fingerprint != fingerprint:
        message = f"{location}: indexed anew while it was being read; run it again"
        raise DataError(message)
    usual = usual_run_length(manifest.num_samples, remote=is_url(location))
    return Reader(manifest, shards=shards, run_length=run_length or usual)


def local_folder(location: str, *, what: str) -> Path:
    """The location as a folder.

    Args:
        location: As it was given.
        what: Which work needs a folder, and what to do instead, for the message.

    Raises:
        DataError: If it is a URL.
    """
    if is_url(location):
        message = f"{location}: {what}"
        raise DataError(message)
    return Path(location)
