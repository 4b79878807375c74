"""One sample as it lies in a shard: undecoded, so that only what is needed is decoded."""

from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["IMAGE_EXTENSIONS", "Sample"]

IMAGE_EXTENSIONS: Final = ("webp", "jpg", "jpeg", "png")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image-text pair under one key of a webdataset shard."""

    key: str
    """Name of the members without extension; unique within a dataset."""
    image: bytes
    """The encoded image file."""
    text: str
    """The caption, from `.txt`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The content of `.json`, empty where there is none."""
