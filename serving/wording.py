"""What does not fit a schema, in the words of JSON rather than of the library that found it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = ["in_words"]

_WORDS: Final = {
    "missing": "is missing",
    "extra_forbidden": "is not known here",
    "string_type": "must be a string",
    "list_type": "must be an array",
    "tuple_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
}
_MOST_CLAUSES: Final = 16
_LONGEST: Final = 400
"""Characters of a place, or of what must stand there: keys are what a client made up."""
_BRANCH: Final = re.compile(
    r"(list|tuple|dict|set|union|tagged-union|nullable|function-\w+|lax-or-strict)\[.*|"
    r"constrained-\w+|str|int|float|bool|bytes|[A-Z]\w*(In|Part|Url|Request)"
)
"""Parts of a place that name which alternative of a schema was tried."""


def in_words(details: Sequence[Mapping[str, Any]]) -> str:
    """One clause for each place: where, and what must stand there.

    Args:
        details: As pydantic's `errors()` gives them: `loc`, `type`, `msg` and, for some, `ctx`.

    Returns:
        E.g. `body.limit: must be greater than or equal to 1; body.labels: is missing`. Where there
        were alternatives, those that got furthest into what was sent are joined by "or".
    """
    alternatives: dict[tuple[str, ...], list[tuple[tuple[str, ...], str]]] = {}
    for detail in details:
        place = tuple(str(part) for part in detail["loc"])
        first = next((n for n, part in enumerate(place) if _is_branch(part)), len(place))
        plain = tuple(part for part in place if not _is_branch(part))
        alternatives.setdefault(place[:first], []).append((plain, _words(detail)))
    clauses: list[str] = []
    for found in alternatives.values():
        deepest = max(len(place) for place, _ in found)
        by_place: dict[tuple[str, ...], list[str]] = {}
        for place, words in found:
            if len(place) == deepest:
                by_place.setdefault(place, []).append(words)
        clauses += [
            f"{_shortened('.'.join(place))}: {_shortened(' or '.join(dict.fromkeys(words)))}"
            for place, words in by_place.items()
        ]
    more = len(clauses) - _MOST_CLAUSES
    return "; ".join(clauses[:_MOST_CLAUSES] + ([f"and {more} more"] if more > 0 else []))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _is_branch(part: str) -> bool:
    return _BRANCH.fullmatch(part) is not None


def _words(detail: Mapping[str, Any]) -> str:
    kind, message = str(detail["type"]), str(detail["msg"])
    if kind == "union_tag_not_found":
        return f"must be an object with a {detail['ctx']['discriminator']}"
    plain = message.removeprefix("Value error, ").replace(" after validation", "")
    return _WORDS.get(
        kind,
        re.sub(r"^(Input|String|List|Tuple|Dictionary|Value|Data|Bytes) should ", "must ", plain),
    )
