"""The load generator against a server that answers in every way that HTTP has."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vlm.cli.bench_load import Tally, load, pace, text_bodies
from vlm.errors import DataError


class _Odd(ThreadingHTTPServer):
    """Answers `status` with `content`, in chunks or whole, and keeps or closes the connection."""

    status, content, headers = 200, b"{}", {"x-kind": "odd"}
    chunked = closes = False

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None, int]] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Odd

    def do_POST(self) -> None:
        odd = self.server
        size = int(self.headers["content-length"])
        assert len(self.rfile.read(size)) == size
        odd.seen.append((self.path, self.headers["authorization"], self.client_address[1]))
        self.send_response(odd.status)
        for name, value in odd.headers.items():
            self.send_header(name, value)
        if odd.closes:
            self.send_header("Connection", "close")
        if odd.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x;note=1\r\n%b\r\n1\r\n \r\n0\r\n\r\n" % (len(odd.content), odd.content)
        else:
            self.send_header("Content-Length", str(len(odd.content)))
            body = odd.content
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Not to the test's output."""


@pytest.fixture
def odd() -> Iterator[_Odd]:
    with _Odd() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server: _Odd) -> Tally:
    """What became of 20 requests over two connections."""
    tally = Tally()
    pace(url_of(server), text_bodies(), rate=200.0, even=True, seconds=0.1, most=2, tally=tally,
         key="secret")  # fmt: skip
    return tally


def url_of(server: _Odd) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("closes", [False, True])
def test_connections_are_kept_unless_the_server_closes_them(
    odd: _Odd, chunked: bool, closes: bool
) -> None:
    odd.chunked, odd.closes = chunked, closes
    tally = asked(odd)
    assert tally.requests == len(odd.seen) == len(tally.latencies) == 20
    assert {(path, key) for path, key, _ in odd.seen} == {("/v1/embeddings", "Bearer secret")}
    ports = {port for _, _, port in odd.seen}
    assert len(ports) == (20 if closes else 2)


def test_a_busy_answer_counts_as_one_only_where_it_says_when_to_come_back(odd: _Odd) -> None:
    odd.status, odd.content = 503, b"full"
    with pytest.raises(DataError, match="answered 503: b'full'"):
        asked(odd)
    odd.headers = {"Retry-After": "1"}
    tally = asked(odd)
    assert (tally.requests, tally.latencies) == (0, [])
    assert tally.refused == 20


def test_an_answer_that_is_none_is_told(odd: _Odd) -> None:
    odd.headers = {"Transfer-Encoding": "chunked"}  # and then it is not
    odd.content = b"no size\r\n"
    with pytest.raises(DataError, match="no size"):
        asked(odd)


def test_paced_requests_keep_to_their_moments(odd: _Odd) -> None:
    assert asked(odd).figures()["per_second"] == 200


def test_load_asks_again_until_the_time_is_over(odd: _Odd) -> None:
    tally = Tally()
    load(url_of(odd), text_bodies(), concurrency=3, seconds=0.3, tally=tally)
    assert tally.requests == len(odd.seen) >= 3
    assert tally.seconds >= 0.3
    assert {key for _, key, _ in odd.seen} == {None}
