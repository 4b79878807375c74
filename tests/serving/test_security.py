import asyncio
import base64
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from serving.access import Access, scope_of
from serving.exchange import Refusal
from serving.logs import configure_logging
from serving.metrics import Metrics
from serving.security import GuardMiddleware
from serving.settings import ServingSettings

KEY = "open sesame"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()


def guarded(**more: object) -> TestClient:
    """A small application behind the guard: one route counts, one swallows, one is broken."""
    app = FastAPI()

    @app.post("/count")
    async def count(request: Request) -> int:
        return len(await request.body())

    @app.post("/swallow")
    async def swallow(request: Request) -> str:
        try:
            await request.body()
        except Exception as error:
            raise HTTPException(400, "parsing failed") from error
        return "read"

    @app.post("/sleep")
    async def sleep(request: Request) -> None:
        await request.body()
        await asyncio.sleep(60)

    @app.get("/broken")
    async def broken() -> None:
        message = "the password of the database is hunter2"
        raise RuntimeError(message)

    @app.get("/healthz")
    async def healthz() -> str:
        return "alive"

    settings = ServingSettings.model_validate({"max_body_bytes": 2000, **more})
    app.add_middleware(GuardMiddleware, settings=settings)
    return TestClient(app, base_url="http://localhost:8000")


def chunks(total: int) -> Iterator[bytes]:
    for _ in range(total // 100):
        yield b"x" * 100


def test_a_body_at_the_limit_passes() -> None:
    assert guarded().post("/count", content=b"x" * 2000).json() == 2000


@pytest.mark.parametrize("path", ["/count", "/swallow"])
def test_a_body_over_the_limit_is_refused_whether_it_tells_its_length_or_not(path: str) -> None:
    for body in (b"x" * 2001, chunks(3000)):
        answer = guarded().post(path, content=body)
        assert answer.status_code == 413
        assert answer.headers["content-type"] == "application/problem+json"
        assert "limit of 2000 bytes" in answer.json()["detail"]


def test_an_announced_length_over_the_limit_is_refused_before_anything_is_read() -> None:
    with guarded() as client:
        request = client.build_request("POST", "/count", headers={"content-length": "2001"})
        assert client.send(request).status_code == 413


def test_bodies_in_flight_share_one_limit_and_give_it_back() -> None:
    client = guarded(max_total_body_bytes=1500)
    answer = client.post("/count", content=b"x" * 1600)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    for _ in range(5):
        assert client.post("/count", content=b"x" * 1400).json() == 1400


def test_a_defect_leaks_nothing_and_is_logged_with_its_request_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR, "serving"):
        answer = guarded().get("/broken")
    assert answer.status_code == 500
    assert "hunter2" not in answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "hunter2" in caplog.text
    assert caplog.records[0].__dict__["request_id"] == answer.headers["x-request-id"]


def test_every_answer_has_safe_headers_and_an_id_of_its_own() -> None:
    client = guarded()
    answers = [client.get("/healthz"), client.get("/absent"), client.get("/broken")]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy


@pytest.mark.parametrize(
    "header",
    [
        f"Bearer {KEY}",
        f"bearer {KEY}",
        "Basic " + base64.b64encode(f"anybody:{KEY}".encode()).decode(),
    ],
)
def test_a_known_key_enters(header: str) -> None:
    client = guarded(api_key_sha256=["0" * 64, DIGEST])
    assert client.post("/count", headers={"authorization": header}).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer",
        "Bearer wrong",
        f"Digest {KEY}",
        f"Bearer {DIGEST}",
        KEY,
        "Basic %%%",
        "Basic " + base64.b64encode(KEY.encode()).decode(),
    ],
)
def test_anything_else_is_asked_for_a_key(header: str | None) -> None:
    client = guarded(api_key_sha256=[DIGEST])
    answer = client.post("/count", headers={"authorization": header} if header else {})
    assert answer.status_code == 401
    sent = header in ("Bearer wrong", f"Bearer {DIGEST}")
    said = "the key that was sent is none of this server's" if sent else "asks for a key"
    assert said in answer.json()["detail"]
    assert "Basic" in answer.headers["www-authenticate"]
    assert client.get("/healthz").status_code == 200


def test_a_page_of_another_site_may_not_write() -> None:
    client = guarded()
    for origin in ("http://evil.example", "null", "http://localhost:8001", "http://["):
        assert client.post("/count", headers={"origin": origin}).status_code == 403
    assert client.post("/count", headers={"origin": "http://localhost:8000"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("evil.example", 421), ("[", 421), ("", 421)],
)
def test_on_loopback_a_name_that_was_bound_to_it_elsewhere_is_refused(
    host: str, status: int
) -> None:
    assert guarded().post("/count", headers={"host": host}).status_code == status


def test_a_server_of_a_network_answers_to_any_name_and_probes_need_none(tmp_path: Path) -> None:
    assert guarded(host="0.0.0.0").post("/count", headers={"host": "a.b"}).status_code == 200
    assert guarded().get("/healthz", headers={"host": "10.0.0.7"}).status_code == 200


def test_no_client_waits_longer_than_it_asked_for_and_none_longer_than_is_allowed() -> None:
    for settings, header in (({}, "0.05"), ({"request_seconds": 0.05}, "60")):
        answer = guarded(**settings).post("/sleep", headers={"x-request-timeout": header})
        assert answer.status_code == 504
        assert "not answered within 0.05 seconds" in answer.json()["detail"]
    assert guarded(request_seconds=0.05).post("/sleep").status_code == 504
    for wrong in ("0", "-1", "nan", "soon", ""):
        answer = guarded().post("/sleep", headers={"x-request-timeout": wrong})
        assert answer.status_code == 400
        assert "a number over 0" in answer.json()["detail"]


def keyed(**more: object) -> TestClient:
    keys = [
        {"name": "asks", "sha256": sha("r"), "requests_per_minute": 60, "burst": 2},
        {"name": "writes", "sha256": sha("w"), "scopes": ["read", "write"]},
        {"name": "rules", "sha256": sha("a"), "scopes": ["admin"]},
    ]
    return guarded(keys=keys, api_key_sha256=[DIGEST], **more)


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/metrics", "read"),
        ("POST", "/v1/classify", "read"),
        ("POST", "/v1/caption", "read"),
        ("POST", "/v2/models/x/infer", "read"),
        ("POST", "/v1/items", "write"),
        ("DELETE", "/v1/items/v1/models/x", "write"),
        ("PUT", "/v1/label-sets/x", "write"),
        ("POST", "/v1/label-sets/x/calibrate", "write"),
        ("POST", "/v1/models/x/load", "admin"),
        ("POST", "/v1/models/x/unload", "admin"),
        ("POST", "/v1/models/x\n/unload", "admin"),
        ("POST", "/v1/models/x/anything", "admin"),
        ("POST", "/v1/classify/", "write"),
    ],
)
def test_each_route_asks_for_one_scope(method: str, path: str, scope: str) -> None:
    assert scope_of(method, path) == scope


def test_a_key_does_what_its_scopes_say_and_no_more() -> None:
    client = keyed()

    def ask(path: str, key: str) -> int:
        return client.post(path, headers={"authorization": f"Bearer {key}"}).status_code

    assert [ask("/count", key) for key in ("r", "w", "a", KEY)] == [403, 200, 403, 200]
    assert [ask("/v1/classify", key) for key in ("w", "a", KEY)] == [404, 403, 404]
    assert [ask("/v1/models/x/load", key) for key in ("w", KEY, "a")] == [403, 403, 404]
    answer = client.post("/count", headers={"authorization": "Bearer r"})
    assert answer.json()["detail"] == "this needs a key of scope write; yours has read"


@pytest.mark.parametrize("path", ["/count%0a", "/v1/search%0a", "/healthz%0d", "/v1/items/a%00b"])
def test_a_path_with_control_characters_is_none(path: str) -> None:
    """A route took a final line break for none, and a key that may only write could search."""
    answer = keyed().post(path, headers={"authorization": "Bearer w"})
    assert answer.status_code == 400
    assert "control character" in answer.json()["detail"]


def test_over_its_rate_a_key_is_told_when_to_come_back() -> None:
    now = [100.0]
    settings = ServingSettings.model_validate(
        {"keys": [{"name": "k", "sha256": sha("k"), "requests_per_minute": 30, "burst": 3}]}
    )
    access = Access(settings, clock=lambda: now[0])
    headers = Headers({"authorization": "Bearer k"})

    def refusal() -> Refusal | None:
        return access.refusal("GET", "/v1/models", headers)

    assert [refusal() for _ in range(3)] == [None] * 3
    refused = refusal()
    assert refused is not None
    assert (refused.status, refused.headers["retry-after"]) == (429, "2")
    assert "over 30 requests a minute" in refused.detail
    now[0] += 2
    assert refusal() is None
    assert refusal() is not None
    now[0] += 3600
    assert [refusal() is None for _ in range(4)] == [True] * 3 + [False]
    assert access.name(headers) == "k"
    answer = [keyed().get("/healthz", headers={"authorization": "Bearer r"}) for _ in range(5)]
    assert {a.status_code for a in answer} == {200}


def test_without_keys_only_this_machine_may_change_models() -> None:
    assert guarded().post("/v1/models/x/load").status_code == 404
    answer = guarded(host="0.0.0.0").post("/v1/models/x/load")
    assert answer.status_code == 403
    assert "no keys" in answer.json()["detail"]


@contextmanager
def logging_as(log_format: Literal["json", "text"]) -> Iterator[None]:
    """The process's loggers as a server sets them, and then as they were."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure_logging(log_format)
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(level)


def test_requests_are_logged_as_json_without_payload_or_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with logging_as("json"):
        client = keyed(access_log=True)
        answer = client.post(
            "/count?q=secret", content=b"secret", headers={"authorization": "Bearer w"}
        )
        client.get("/broken", headers={"authorization": "Bearer w"})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    asked = [line for line in lines if line["event"] == "request"]
    assert asked[0]["request_id"] == answer.headers["x-request-id"]
    assert {k: asked[0][k] for k in ("method", "route", "status", "client", "level")} == {
        "method": "POST", "route": "/count", "status": 200, "client": "writes", "level": "info",
    }  # fmt: skip
    assert "secret" not in json.dumps(asked)
    (defect,) = [line for line in lines if line["event"] == "defect"]
    assert "hunter2" in defect["exception"]
    assert asked[1]["request_id"] == defect["request_id"]


def test_requests_are_logged_as_text_with_the_same_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lines said `request` alone."""
    with logging_as("text"):
        answer = keyed(access_log=True).post("/count", headers={"authorization": "Bearer w"})
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("INFO serving: request"))
    assert line.startswith("INFO serving: request method=POST route=/count status=200 ")
    assert f"client=writes ms={line.split('ms=')[1].split()[0]}" in line
    assert line.endswith(f"request_id={answer.headers['x-request-id']}")


def test_a_client_that_leaves_while_it_sends_is_no_defect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It was a 500 and a traceback."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()

    metrics = Metrics()
    guard = GuardMiddleware(app, ServingSettings(), metrics)
    messages: list[Message] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b"{", "more_body": True},
    ]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        return

    scope = {
        "type": "http", "method": "POST", "path": "/count", "query_string": b"",
        "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1),
    }  # fmt: skip
    asyncio.run(guard(scope, receive, send))
    assert not caplog.records
    assert b'status="499"' in metrics.exposition()
