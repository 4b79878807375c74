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
    for word in ("Input", "Value error", "dict", "instance", "constrained", "tagged"):
        assert word not in detail
