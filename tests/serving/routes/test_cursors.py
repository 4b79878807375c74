"""`after` of a search: what no page has given is refused, whatever a client makes up."""

import base64
import json

from fastapi.testclient import TestClient
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.serving.wire import problem

_REFUSED = "after: not what a page before has given as next"
_JSON = (
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
    .filter(lambda told: not (isinstance(told, list) and len(told) == 3))
    .map(json.dumps)
)


def check_refused(client: TestClient, after: str) -> None:
    # Escaped by json, so that what is no text gets as far as the server.
    content = json.dumps({"text": "a", "after": after})
    headers = {"content-type": "application/json"}
    problem(client.post("/v1/search", content=content, headers=headers), 422)


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


@given(told=_JSON)
@example(told='[1, "a", Infinity]')  # these four raised, and the answer was a 500
@example(told='[1, "a", 1e999]')
@example(told=f'[1{"0" * 400}, "a", 1]')
@example(told="[" * 1490)
@example(told='[NaN, "a", 1]')
@example(told='[-Infinity, "a", 1]')
@example(told='[1, ["a"], 1]')
@example(told='[1, "a", 10000]')
@example(told='[1, "a", 1.5]')
@example(told='["1", "a", "1"]')
@settings(max_examples=60, deadline=None)
def test_json_that_is_no_cursor_is_refused(client: TestClient, told: str) -> None:
    check_refused(client, encoded(told))


@given(after=st.text(max_size=2100))
@settings(max_examples=60, deadline=None)
def test_text_that_is_no_cursor_is_refused(client: TestClient, after: str) -> None:
    check_refused(client, after)


def test_each_such_refusal_says_where_it_comes_from(client: TestClient) -> None:
    for told in ('[1, "a", Infinity]', "[" * 1490):
        answer = client.post("/v1/search", json={"text": "a", "after": encoded(told)})
        assert problem(answer, 422) == _REFUSED
