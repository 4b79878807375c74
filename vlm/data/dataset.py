"""From the location of a dataset to a reader of it: a folder or a URL, whole or filtered."""

from pathlib import Path

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from vlm.config import Config
from vlm.data.captions import CaptionConfig
from vlm.data.filter import open_filter
from vlm.data.location import open_location
from vlm.data.plan import usual_run_length
from vlm.data.reader import Reader
from vlm.data.remote import RemoteConfig, fetch_filter
from vlm.files import is_url

__all__ = ["SourceConfig", "StageConfig", "open_reader"]


class SourceConfig(Config):
    """One dataset of a mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """In the log, and in what tells equal keys of two sources apart."""
    shards: str
    """A folder, or a URL that begins with s3://, gs://, az:// or https://."""
    weight: float = Field(1.0, ge=0)
    """Share of the samples of a batch, relative to the other sources."""
    repeat: bool = True
    """Begin anew when every sample came; otherwise the other sources share its part then."""
    captions: CaptionConfig | None = None
    """Instead of `data.stream.captions`."""
    filter: str | None = None
    """Name of a filter that `vlm data filter` wrote; only what it keeps comes."""


class StageConfig(Config):
    """A change of weights in the course of a run."""

    from_step: int = Field(ge=1)
    weights: dict[str, float]
    """By name of the source; those left out get 0."""


def open_reader(
    location: str,
    *,
    remote: RemoteConfig,
    run_length: int | None = None,
    filter_name: str | None = None,
) -> tuple[Reader, int]:
    """A reader of a dataset and the run length that suits it.

    Args:
        location: A folder or a URL.
        remote: How a URL is read.
        run_length: Neighbours fetched together; by default `usual_run_length`.
        filter_name: Of a filter in `filters/` beside the manifest, or none for all samples.

    Raises:
        DataError: If there is no intact dataset, or no such filter of it.
        StoreError: If a remote store does not answer.
    """
    manifest, shards = open_location(location, remote)
    kept: Int64[np.ndarray, " kept"] | None = None
    if filter_name is not None:
        url = is_url(location)
        # A fetched filter is verified as it comes.
        folder = fetch_filter(location, filter_name, manifest, remote) if url else Path(location)
        kept = open_filter(folder, filter_name, manifest, location=location)
    count = manifest.num_samples if kept is None else len(kept)
    length = run_length or usual_run_length(count, remote=is_url(location))
    return Reader(manifest, shards=shards, kept=kept, run_length=length), length
