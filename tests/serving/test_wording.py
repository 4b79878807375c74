"""Refusals name the place and what must stand there, in the words of JSON."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

STRING = "must be a string"


@pytest.mark.parametrize(
    ("method", "path", "body", "said"),
    [
        ("post", "/v1/classify", [1], "body: must be an object"),
        (
            "post", "/v1/classify", {"images": 3, "top_k": "x", "more": 1},
            "body.images: must be an array; body.top_k: must be a whole number; "
            "body.more: is not known here",
        ),
        ("post", "/v1/classify", {"images": [3]}, "body.images.0: must be base64 text, a data URL"),
        ("post", "/v1/search", {"text": "a", "limit": 0}, "body.limit: must be greater than"),
        (
            "post", "/v1/embeddings", {"input": {}},
            f"body.input: {STRING} or must be an object with a 'type' or must be an array",
        ),
        (
            "post", "/v1/embeddings", {"input": ["a", {"x": 1}]},
            f"body.input.1: {STRING} or must be an object with a 'type'",
        ),
        ("post", "/v1/search", {"text": "a", "k[0]": 1}, "body.k[0]: is not known here"),
        ("post", "/v1/search", {"text": "a", "filter": {"k[0]": None}}, "body.filter.k[0]: "),
        ("post", "/v1/items/delete", {f"k{n}": 0 for n in range(5000)}, "body: an object of 5000"),
        ("put", "/v1/collections/a", {f"k{n}": 0 for n in range(5000)}, "body: an object of 5000"),
        (
            "put", "/v1/collections/a/alias", {f"k{n}": 0 for n in range(5000)},
            "body: an object of 5000",
        ),
        ("put", "/v1/label-sets/a", {"classes": [{"name": 1}]}, "body.classes.0.label: is missing"),
        ("put", "/v1/collections/a/alias", 3, "body: must be an object"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_words_of_json(
    client: TestClient, method: str, path: str, body: Any, said: str
) -> None:
    answer = client.request(method, path, json=body)
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert detail.startswith(said)
    assert len(detail) < 10_000
    for word in ("Input", "Value error", "dict", "instance", "constrained", "tagged"):
        assert word not in detail


def test_of_very_many_mistakes_some_are_told(client: TestClient) -> None:
    """All of them, with keys of any length, were half a megabyte and more."""
    mistakes: dict[str, Any] = {f"k{n}": None for n in range(4000)} | {"x" * 100_000: None}
    answer = client.post("/v1/search", json={"text": "a", "filter": mistakes})
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert detail.endswith("; and 3985 more")
    assert len(detail) < 10_000
