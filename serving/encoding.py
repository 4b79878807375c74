"""Files within JSON: base64, plain or in a data URL."""

import binascii
import re
from typing import Final

__all__ = ["from_base64", "is_data_url", "without_data_url"]

_DATA_URL: Final = re.compile(
    r"\s{0,9}data:(?:[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.IGNORECASE
)


def from_base64(text: str) -> bytes:
    """The bytes of base64 text, which may be wrapped into lines, as `base64 FILE` prints it.

    Raises:
        ValueError: If it is not base64.
    """
    plain = text.strip().replace("\n", "").replace("\r", "")
    return binascii.a2b_base64(plain, strict_mode=True)


def is_data_url(text: str) -> bool:
    """Whether this begins as a data URL in base64 does, of any kind of content."""
    return _DATA_URL.match(text) is not None


def without_data_url(text: str) -> str:
    """The base64 of a data URL; anything else as it is."""
    head = _DATA_URL.match(text)
    return text if head is None else text[head.end() :]
