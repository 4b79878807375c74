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
    """The content of `.json`; where there is none, `cls` with the number of `.cls`, if any."""


def hash_text(text: str) -> int:
    """A 64-bit hash of a text; the same in every run and on every machine."""
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def decode_text_and_metadata(text: bytes, metadata: bytes) -> tuple[str, dict[str, Any]]:
    """Caption and metadata of a sample, from the bytes of its `.txt` and its `.json` or `.cls`.

    Raises:
        ValueError: If the text is not UTF-8, or the metadata neither a JSON object nor a number of
            a class.
    """
    try:
        caption = text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        message = f"its text is not UTF-8 ({error.reason} at byte {error.start})"
        raise ValueError(message) from error
    try:
        tree = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        message = f"its .json cannot be read ({error})"
        raise ValueError(message) from error
    if type(tree) is int:
        tree = {"cls": tree}
    if not isinstance(tree, dict):
        message = "its .json is not an object, nor its .cls a number"
        raise ValueError(message)
    return caption, tree
