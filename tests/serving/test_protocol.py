"""Connections that bring no request are closed; those that bring one are not."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serving.conftest import Server, running

HEAD = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"
BODY_HEAD = b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n"


@pytest.fixture(scope="module")
def impatient(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("impatient")
    with running(f"bundle={bundle}", f"index={folder / 'index'}", "head_seconds=1") as server:
        yield server


def connect(server: Server) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def test_a_connection_that_says_nothing_is_closed(impatient: Server) -> None:
    with connect(impatient) as connection:
        assert connection.recv(1) == b""


def test_headers_that_drip_in_are_not_waited_for(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(HEAD)
        connection.settimeout(0.1)
        for number in range(100):
            with contextlib.suppress(TimeoutError):
                assert connection.recv(1) == b""
                break
            connection.sendall(b"x-%d: y\r\n" % number)
        else:
            pytest.fail("100 headers, one each 0.1 s, were waited for")


def test_so_it_is_with_a_second_request_of_a_connection(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(HEAD + b"\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200")
        connection.sendall(HEAD)
        assert connection.recv(1) == b""


def test_a_body_has_the_time_of_its_request(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(BODY_HEAD + b"content-type: application/json\r\n\r\n{")
        time.sleep(1.5)
        connection.sendall(b"        ")
        assert connection.recv(4096).startswith(b"HTTP/1.1 422")


def test_a_body_that_was_answered_before_it_was_read_is_not_waited_for(impatient: Server) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999\r\n\r\n"
    with connect(impatient) as connection:
        connection.sendall(head)  # without a content type: 415
        connection.settimeout(0.1)
        answer = b""
        for _ in range(100):
            with contextlib.suppress(TimeoutError, ConnectionError):
                received = connection.recv(4096)
                answer += received
                if not received:
                    break
                continue
            with contextlib.suppress(OSError):
                connection.sendall(b" ")
        else:
            pytest.fail("100 bytes, one each 0.1 s, were waited for")
        assert answer.startswith(b"HTTP/1.1 415")


def test_probes_answer_to_head(impatient: Server) -> None:
    for path in ("/healthz", "/readyz"):
        answer = impatient.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
