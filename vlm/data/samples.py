"""One sample as it lies in a shard: undecoded, so that only what is needed is decoded."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["IMAGE_EXTENSIONS", "Sample", "decode_text_and_metadata", "hash_text"]

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


def hash_text(text: str) -> int:
    """A 64-bit hash of a text; the same in every run and on every machine."""
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def decode_text_and_metadata(text: bytes, metadata: bytes) -> tuple[str, dict[str, Any]]:
    """Caption and metadata of a sample, from the bytes of its `.txt` and `.json`.

    Raises:
        ValueError: If the text is not UTF-8, or the metadata not a JSON object.
    """
    caption = text.decode("utf-8").strip()
    tree = json.loads(metadata)
    if not isinstance(tree, dict):
        message = "its .json is not an object"
        raise ValueError(message)
    return caption, tree
