"""Filters as expressions of Milvus, and the columns that they look at.

Nothing that a client wrote gets into an expression but ids, of which every character that is not an
ASCII letter or digit is escaped: keys and values are hashed, numbers become integers. Milvus 2.3
finds no text inside of another one, so `contains` is not translated here.
"""

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from serving.stores.filters import (
    Condition,
    Contains,
    Filter,
    IsModality,
    OneOf,
    Range,
    as_number,
    facet,
    facets_of,
)

__all__ = [
    "DIGEST_CHARACTERS",
    "all_of",
    "any_word",
    "digest",
    "filter_columns",
    "one_of_ids",
    "quoted",
    "translated",
]

DIGEST_CHARACTERS: Final = 24


def digest(text: str) -> str:
    """A name for a text that is safe in every expression: 24 hex digits."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_CHARACTERS // 2).hexdigest()


def filter_columns(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored beside the metadata, for filters to look at."""
    numbers = {key: as_number(value) for key, value in metadata.items()}
    return {
        "facets": sorted({digest(each) for each in facets_of(metadata)}),
        "numbers": {
            digest(key): _ordinal(number)
            for key, number in numbers.items()
            if number is not None and not math.isnan(number)
        },
    }


def translated(where: Filter) -> str:
    """An expression for all conditions but `contains`; empty if it lets everything through."""
    return all_of(*(_condition(condition) for condition in where))


def all_of(*expressions: str) -> str:
    """All of the expressions that are not empty; empty for none."""
    return " and ".join(f"({each})" for each in expressions if each)


def one_of_ids(ids: Sequence[str]) -> str:
    """The items of some ids."""
    return f"id in [{', '.join(quoted(each) for each in ids)}]"


def any_word(words: Sequence[str]) -> str:
    """The items whose text has one of the words."""
    listed = ", ".join(f'"{digest(word)}"' for word in words)
    return f"array_contains_any(words, [{listed}])"


def quoted(text: str) -> str:
    """A string literal in which nothing but ASCII letters and digits stands for itself."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character.isascii() and character.isalnum():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _condition(condition: Condition) -> str:
    match condition:
        case IsModality(modality):
            return f"modality == {quoted(modality)}"
        case OneOf():
            return f"array_contains_any(facets, [{_facets(condition)}])"
        case Range():
            return _range(condition)
        case Contains():
            return ""


def _facets(condition: OneOf) -> str:
    return ", ".join(f'"{digest(facet(condition.key, value))}"' for value in condition.values)


def _range(bounds: Range) -> str:
    value = f'numbers["{digest(bounds.key)}"]'
    pairs = ((">", bounds.gt), (">=", bounds.gte), ("<", bounds.lt), ("<=", bounds.lte))
    return " and ".join(
        f"{value} {sign} {_ordinal(bound)}" for sign, bound in pairs if bound is not None
    )


def _ordinal(number: float) -> int:
    """An integer in the order of the numbers, infinity too, which JSON has no form for."""
    (bits,) = struct.unpack("<q", struct.pack("<d", number + 0.0))
    magnitude: int = bits & 0x7FFF_FFFF_FFFF_FFFF
    return magnitude if bits >= 0 else -magnitude
