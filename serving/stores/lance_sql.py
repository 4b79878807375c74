"""Filters as the SQL of LanceDB.

Columns: `facets` holds what equality is asked of; `keys`, `numbers` and `strings` are lists side by
side, a place for each plain metadata value. Whatever a client wrote is a quoted literal.
"""

from collections.abc import Sequence
from typing import Any

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

__all__ = ["conjunction", "filter_columns", "quoted", "quoted_list", "sql"]


def filter_columns(metadata: dict[str, Any]) -> dict[str, Any]:
    """What is stored beside the metadata, for filters to look at."""
    plain = {key: value for key, value in metadata.items() if isinstance(value, str | int | float)}
    return {
        "facets": facets_of(metadata),
        "keys": list(plain),
        "numbers": [as_number(value) for value in plain.values()],
        "strings": [value.lower() if isinstance(value, str) else None for value in plain.values()],
    }


def sql(where: Filter) -> str | None:
    """A WHERE clause; None for the filter that lets everything through."""
    return conjunction([_condition(condition) for condition in where])


def conjunction(clauses: Sequence[str]) -> str | None:
    """All of the clauses; None for none."""
    return " AND ".join(f"({clause})" for clause in clauses) or None


def quoted(text: str) -> str:
    """A SQL string literal; a quote inside is doubled, and nothing else has a meaning in it."""
    return "'" + text.replace("'", "''") + "'"


def quoted_list(texts: Sequence[str]) -> str:
    """Literals with commas between them."""
    return ", ".join(quoted(text) for text in texts)


def _condition(condition: Condition) -> str:
    match condition:
        case IsModality(modality):
            return f"modality = {quoted(modality)}"
        case OneOf(key=key, values=values):
            literals = [facet(key, value) for value in values]
            if len(literals) == 1:
                return f"array_has(facets, {quoted(literals[0])})"
            return f"array_has_any(facets, [{quoted_list(literals)}])"
        case Contains(key=key, text=text):
            return f"contains({_value('strings', key)}, {quoted(text.lower())})"
        case Range():
            return _range(condition)


def _range(bounds: Range) -> str:
    value = _value("numbers", bounds.key)
    pairs = ((">", bounds.gt), (">=", bounds.gte), ("<", bounds.lt), ("<=", bounds.lte))
    return " AND ".join(
        f"{value} {sign} CAST({quoted(repr(bound))} AS DOUBLE)"
        for sign, bound in pairs
        if bound is not None
    )


def _value(column: str, key: str) -> str:
    return f"array_element({column}, CAST(array_position(keys, {quoted(key)}) AS BIGINT))"
