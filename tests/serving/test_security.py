import base64
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

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
