"""What a search may ask of metadata: a small typed language that each store makes its query of.

A filter is a tuple of conditions that must all hold. On the wire it is an object from metadata keys
to a value (equality) or to an object of operators:

    {"style": "flat", "year": {"gte": 1990, "lt": 2000}, "kind": {"in": ["a", "b"]},
     "title": {"contains": "sea"}}

A list in the metadata holds a value if one of its elements equals it. Numbers are equal by value,
and never equal to texts or booleans.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from serving.errors import BadInputError

__all__ = [
    "Condition",
    "Contains",
    "Filter",
    "IsModality",
    "Modality",
    "OneOf",
    "Range",
    "Scalar",
    "as_number",
    "facet",
    "facets_of",
    "matches",
    "parse_filter",
]

Scalar = str | int | float | bool
Modality = Literal["image", "text"]
_BOUNDS: Final = ("gt", "gte", "lt", "lte")
_OPERATORS: Final = ("in", "contains", *_BOUNDS)
_MAX_VALUES: Final = 1000
_MAX_KEYS: Final = 64
"""Stores nest the conditions in one query: of many thousand it took minutes, or the stack."""
_EXACT_INTEGERS: Final = 2.0**53


@dataclass(frozen=True, kw_only=True)
class OneOf:
    """The value is one of these; of one value: equality."""

    key: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True, kw_only=True)
class Range:
    """The value is a number within bounds; None: no bound."""

    key: str
    gt: float | None = None
    gte: float | None = None
    lt: float | None = None
    lte: float | None = None


@dataclass(frozen=True, kw_only=True)
class Contains:
    """The value is a text that holds this one, whatever the case of its letters."""

    key: str
    text: str


@dataclass(frozen=True)
class IsModality:
    """The vector is of an image, or of a text."""

    modality: Modality


Condition = OneOf | Range | Contains | IsModality
Filter = tuple[Condition, ...]


def parse_filter(tree: Mapping[str, Any]) -> Filter:
    """The conditions of a filter as it comes over the wire.

    Raises:
        BadInputError: If one is not understood; the message names the key and what is allowed.
    """
    if len(tree) > _MAX_KEYS:
        message = f"filter: {len(tree)} keys, at most {_MAX_KEYS} are allowed"
        raise BadInputError(message)
    try:
        json.dumps(dict(tree), ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        message = "filter: a lone surrogate, which is half of a character and no text"
        raise BadInputError(message) from error
    return tuple(condition for key, value in tree.items() for condition in _conditions(key, value))


def matches(where: Filter, metadata: Mapping[str, Any], modality: Modality = "image") -> bool:
    """Whether an item fulfils a filter: what every store's own query must agree with."""
    return all(_holds(condition, metadata, modality) for condition in where)


def facets_of(metadata: Mapping[str, Any]) -> list[str]:
    """Everything that equality may be asked of, as strings that hold key, type and value."""
    return sorted(
        {
            facet(key, value)
            for key, found in metadata.items()
            for value in (found if isinstance(found, list) else [found])
            if isinstance(value, Scalar)
        }
    )


def facet(key: str, value: Scalar) -> str:
    """One metadata value as a string, equal for equal values and for no others."""
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_INTEGERS:
        value = int(value)
    return f"{json.dumps(key, ensure_ascii=False)}={json.dumps(value, ensure_ascii=False)}"


def as_number(value: object) -> float | None:
    """The value as what bounds are asked of; None if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _conditions(key: str, value: Any) -> list[Condition]:
    if isinstance(value, Scalar):
        return [OneOf(key=key, values=(value,))]
    if not isinstance(value, Mapping) or not value:
        message = (
            f"filter {key!r}: must be a string, number or boolean, or an object with some of "
            f"{', '.join(_OPERATORS)}"
        )
        raise BadInputError(message)
    for name in value:
        if name not in _OPERATORS:
            message = f"filter {key!r}: no operator {name!r}; there are {', '.join(_OPERATORS)}"
            raise BadInputError(message)
    found: list[Condition] = []
    if "in" in value:
        found.append(OneOf(key=key, values=_values(key, value["in"])))
    if "contains" in value:
        found.append(Contains(key=key, text=_text(key, value["contains"])))
    bounds = {name: _bound(key, name, value[name]) for name in _BOUNDS if name in value}
    return [*found, Range(key=key, **bounds)] if bounds else found


def _values(key: str, value: Any) -> tuple[Scalar, ...]:
    if (
        isinstance(value, list | tuple)
        and 0 < len(value) <= _MAX_VALUES
        and all(isinstance(each, Scalar) for each in value)
    ):
        return tuple(value)
    message = f"filter {key!r}: in must be a list of 1 to {_MAX_VALUES} strings, numbers, booleans"
    raise BadInputError(message)


def _text(key: str, value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    message = f"filter {key!r}: contains must be a string that is not empty"
    raise BadInputError(message)


def _bound(key: str, name: str, value: Any) -> float:
    number = as_number(value)
    if number is None or number != number:
        message = f"filter {key!r}: {name} must be a number"
        raise BadInputError(message)
    return number


def _holds(condition: Condition, metadata: Mapping[str, Any], modality: Modality) -> bool:
    if isinstance(condition, IsModality):
        return condition.modality == modality
    if isinstance(condition, OneOf):
        wanted = {facet(condition.key, value) for value in condition.values}
        return not wanted.isdisjoint(facets_of(metadata))
    value = metadata.get(condition.key)
    if isinstance(condition, Contains):
        return isinstance(value, str) and condition.text.lower() in value.lower()
    return _within(condition, as_number(value))


def _within(bounds: Range, number: float | None) -> bool:
    return (
        number is not None
        and (bounds.gt is None or number > bounds.gt)
        and (bounds.gte is None or number >= bounds.gte)
        and (bounds.lt is None or number < bounds.lt)
        and (bounds.lte is None or number <= bounds.lte)
    )
