"""Addresses that a client chose: what may be asked for, against real servers on loopback."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.errors import BadInputError
from serving.services.fetching import Fetcher, is_public
from serving.settings import RemoteImages, ServingSettings
from tests.serving.wire import picture, problem


class Pictures(BaseHTTPRequestHandler):
    """Good and bad answers by path; remembers who was asked."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(f"{self.headers['host']}{self.path}")
        assert isinstance(self.server, ThreadingHTTPServer)
        port = self.server.server_port
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("location", self.path.removeprefix("/to/").replace("PORT", str(port)))
            self.end_headers()
            return
        if self.path == "/slow":
            threading.Event().wait(1)
        self.send_response(404 if self.path == "/absent" else 200)
        if self.path == "/packed":
            self.send_header("content-encoding", "gzip")
        self.end_headers()
        self.wfile.write(b"x" * 5000 if self.path == "/large" else picture())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def fetcher(port: int, names: dict[str, list[str]], **more: Any) -> Fetcher:
    """Only 127.0.0.1 counts as public here; names lead where the test says."""

    async def resolve(host: str, port: int) -> list[str]:
        return names.get(host, [host])

    settings = RemoteImages(schemes=["http"], ports=[port], seconds=more.pop("seconds", 30), **more)
    return Fetcher(settings, resolve=resolve, is_allowed=lambda address: address == "127.0.0.1")


def refusal(found: Fetcher, url: str) -> str:
    with pytest.raises(BadInputError) as caught:
        asyncio.run(found.fetch("images.0", url))
    return str(caught.value)


def test_an_image_is_fetched_by_name_and_through_redirects(port: int) -> None:
    names = {"pictures.example": ["127.0.0.1"]}
    found = fetcher(port, names)
    for path in ("/red.png", "/to//red.png", "/to/http://127.0.0.1:PORT/red.png"):
        url = f"http://pictures.example:{port}{path}"
        assert asyncio.run(found.fetch("images.0", url)) == picture()
    assert f"pictures.example:{port}/red.png" in Pictures.asked


def test_a_name_is_resolved_once_and_its_checked_address_is_asked(port: int) -> None:
    answers = [["127.0.0.1"], ["127.0.0.2"]]

    async def resolve(host: str, port: int) -> list[str]:
        return answers.pop(0)

    settings = RemoteImages(schemes=["http"], ports=[port])
    found = Fetcher(settings, resolve=resolve, is_allowed=lambda a: a == "127.0.0.1")
    assert asyncio.run(found.fetch("f", f"http://rebound.example:{port}/red.png")) == picture()
    assert len(answers) == 1
    assert "not on the public internet" in refusal(found, f"http://rebound.example:{port}/red.png")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/to/http://127.0.0.2:PORT/red.png", "not on the public internet"),
        ("/to/http://metadata.example:PORT/red.png", "not on the public internet"),
        ("/to/http://127.0.0.1:1/red.png", "may be asked for"),
        ("/to/ftp://127.0.0.1:PORT/red.png", "may be asked for"),
        ("/to/file:///etc/passwd", "not an address"),
        ("/to//to//to//to//red.png", "more than 3 redirects"),
        ("/absent", "answered 404"),
        ("/packed", "compressed body"),
        ("/large", "over the limit of 4000 bytes"),
    ],
)
def test_what_is_answered_cannot_lead_elsewhere_or_be_too_much(
    port: int, path: str, said: str
) -> None:
    names = {"metadata.example": ["127.0.0.1", "169.254.169.254"]}
    before = len(Pictures.asked)
    found = refusal(fetcher(port, names, max_bytes=4000), f"http://127.0.0.1:{port}{path}")
    assert found.startswith("images.0: ")
    assert said in found
    assert not [a for a in Pictures.asked[before:] if not a.startswith(f"127.0.0.1:{port}")]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://user:password@127.0.0.1:PORT/", "not an address"),
        ("http://127.0.0.1:PORT/ x", "not an address"),
        ("http://127.0.0.1:PORT/\r\nx: y", "not an address"),
        ("http://[::1", "not an address"),
        ("http://", "not an address"),
        ("http://./", "not an address"),
        ("http://a..b:PORT/", "not an address"),
        (f"http://{'a' * 70}.com:PORT/", "not an address"),
        ("http://127.0.0.1:99999/", "not an address"),
        ("http://127.0.0.1/", "may be asked for"),
        ("https://127.0.0.1:PORT/", "may be asked for"),
        ("http://other.example:PORT/", "not among those"),
        ("http://localhost:PORT/", "not on the public internet"),
    ],
)
def test_addresses_that_may_not_be_asked_for(port: int, url: str, said: str) -> None:
    hosts = ["127.0.0.1", "localhost"]
    found = fetcher(port, {"localhost": ["::1"]}, hosts=hosts)
    assert said in refusal(found, url.replace("PORT", str(port)))


def test_who_does_not_answer_in_time_is_given_up(port: int) -> None:
    found = fetcher(port, {}, seconds=0.1)
    assert "did not answer" in refusal(found, f"http://127.0.0.1:{port}/slow")
    assert "did not answer" in refusal(fetcher(1, {}), "http://127.0.0.1:1/")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1",
        "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:8.8.8.8",
        "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::", "::127.0.0.1",
        "2001:db8::1", "localhost", "", "127.1", "0x7f000001",
    ],
)  # fmt: skip
def test_addresses_that_are_not_of_the_public_internet(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1"])
def test_addresses_of_the_public_internet(address: str) -> None:
    assert is_public(address)


def test_addresses_are_refused_unless_they_are_switched_on_and_loopback_always(
    bundle: Path, tmp_path: Path, port: int
) -> None:
    url = f"http://127.0.0.1:{port}/red.png"
    requests: dict[str, dict[str, Any]] = {
        "/v1/classify": {"images": [url], "labels": ["a"]},
        "/v1/search": {"image": url},
        "/v1/embeddings": {"input": [{"type": "image_url", "image_url": {"url": url}}]},
    }
    remote = RemoteImages(schemes=["http"], ports=[port])
    for allowed, said in ((None, "fetches no images"), (remote, "not on the public internet")):
        settings = ServingSettings(bundle=bundle, index=tmp_path, remote_images=allowed)
        with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
            before = len(Pictures.asked)
            for path, body in requests.items():
                assert said in problem(client.post(path, json=body), 422)
            assert len(Pictures.asked) == before
            text = client.post("/v1/embeddings", json={"input": url})  # a text like any other
            assert text.json()["usage"]["total_tokens"] > 2
            parts = [{"type": "text", "text": "red"}, "red"]
            data = client.post("/v1/embeddings", json={"input": parts}).json()["data"]
            assert data[0]["embedding"] == data[1]["embedding"]
