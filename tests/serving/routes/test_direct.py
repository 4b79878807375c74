"""Routes that are found without FastAPI answer what they answer when FastAPI finds them."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.types import Receive, Scope, Send

from serving.routes import routers
from serving.routes.direct import DirectMiddleware, DirectRoute
from tests.serving.wire import data_url
from tests.support import drawing, encoded

_IMAGE = data_url(encoded(drawing("red", "circle")))
ASKED: dict[str, dict[str, Any]] = {
    "rows": {"url": "/v1/embeddings", "json": {"input": ["a red circle", _IMAGE]}},
    "a model as the answer": {
        "url": "/v1/classify",
        "json": {"image": _IMAGE, "labels": ["circle", "square"]},
    },
    "a body that does not fit": {"url": "/v1/embeddings", "json": {"input": []}},
    "no JSON": {
        "url": "/v1/search",
        "content": b"{",
        "headers": {"content-type": "application/json"},
    },
    "another type": {"url": "/v1/similarity", "content": b"a"},
    "an unknown model": {"url": "/v1/embeddings", "json": {"input": "a", "model": "none"}},
    "a mistake that the service finds": {
        "url": "/v1/embeddings",
        "json": {"input": "a", "dimensions": 3},
    },
    "a wrong method": {"url": "/v1/embeddings", "method": "PUT"},
    "a slash too many": {"url": "/v1/embeddings/", "json": {"input": "a"}},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_the_short_way_answers_what_the_long_way_does(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    async def long_way(self: DirectMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    short = client.request(**{"method": "POST", **asked})
    monkeypatch.setattr(DirectMiddleware, "__call__", long_way)
    long = client.request(**{"method": "POST", **asked})
    assert short.status_code == long.status_code
    assert _without_id(short.json()) == _without_id(long.json())
    for answer in (short, long):
        answer.headers.pop("x-request-id")
    assert short.headers.keys() == long.headers.keys()


def test_the_short_way_is_taken_where_a_path_has_no_places(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {
        route.path
        for router in routers
        for route in router.routes
        if isinstance(route, DirectRoute) and "{" not in route.path
    }
    assert "/v1/embeddings" in paths
    monkeypatch.setattr(DirectRoute, "answer", _taken)
    answers = {path: client.post(path).status_code for path in paths}
    assert answers == dict.fromkeys(paths, 500)  # the guard answers for `_taken`
    text = client.get("/metrics").text
    assert all(f'route="{path}",status="500"' in text for path in paths)


async def _taken(self: DirectRoute, request: Any) -> Any:
    raise AssertionError(self.path)


def _without_id(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name != "request_id"}
