import itertools
import string

from hypothesis import given
from hypothesis import strategies as st

from serving.stores import parse_filter
from serving.stores.milvus_expressions import (
    all_of,
    any_word,
    filter_columns,
    one_of_ids,
    quoted,
    translated,
)

SAFE = set(string.ascii_letters + string.digits + ' \\"[](),=<>_.-')


@given(text=st.text())
def test_a_literal_holds_letters_digits_and_escapes_alone_and_says_the_text(text: str) -> None:
    inner = quoted(text)[1:-1]
    assert set(inner) <= set(string.ascii_letters + string.digits + "\\")
    assert inner.encode().decode("unicode_escape") == text


@given(key=st.text(min_size=1), value=st.text(), number=st.floats(allow_nan=False))
def test_nothing_of_a_filter_gets_into_its_expression(key: str, value: str, number: float) -> None:
    tree = {key: {"in": [value, number], "gt": number}}
    expression = all_of(translated(parse_filter(tree)), one_of_ids([value]), any_word([value]))
    assert set(expression) <= SAFE


@given(numbers=st.lists(st.floats(allow_nan=False), min_size=2, max_size=2))
def test_numbers_keep_their_order_as_integers_infinity_too(numbers: list[float]) -> None:
    low, high = (next(iter(filter_columns({"k": n})["numbers"].values())) for n in numbers)
    assert (low < high, low == high) == (numbers[0] < numbers[1], numbers[0] == numbers[1])
    for bound in (low, high):
        assert -(2**63) < bound < 2**63


def test_what_no_bound_is_asked_of_has_no_number() -> None:
    metadata = {"a": True, "b": "3", "c": [1], "d": None, "e": float("nan"), "f": 10**400}
    assert len(filter_columns(metadata)["numbers"]) == 1
    for one, other in itertools.combinations((True, 1, "1"), 2):
        assert filter_columns({"k": one})["facets"] != filter_columns({"k": other})["facets"]
