"""Real servers on loopback that speak S3 and plain HTTP, and a proxy that misbehaves on purpose."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of a moto server in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ}
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection((HOST, port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "the S3 server ended by itself"
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.05)
        yield f"http://{HOST}:{port}"
    finally:
        process.kill()
        process.wait()


def s3_environment(endpoint: str) -> dict[str, str]:
    """What a process must find in its environment to reach that server."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on, and spoils a share of the GET answers by turns of kind.

    Kinds: `error` (500), `throttle` (503 SlowDown), `refuse` (429), `stall` (no answer within the
    client's patience), `short` (the connection closes inside the body).
    """

    daemon_threads = True

    def __init__(
        self, upstream: str, *, rate: float, kinds: tuple[str, ...], stall_seconds: float = 3.0
    ) -> None:
        super().__init__((HOST, 0), _ProxyHandler)
        self.upstream = upstream.removeprefix("http://")
        self.rate = rate
        self.kinds = kinds
        self.stall_seconds = stall_seconds
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self.bytes_served = 0
        self._generator = np.random.default_rng(0)
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.server_port}"

    def fault(self) -> str | None:
        with self._lock:
            self.requests += 1
            if self._generator.random() >= self.rate:
                return None
            kind = self.kinds[sum(self.injected.values()) % len(self.kinds)]
            self.injected[kind] += 1
            return kind

    def served(self, count: int) -> None:
        with self._lock:
            self.bytes_served += count


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def do_GET(self) -> None:
        fault = self.server.fault()
        status = {"error": 500, "throttle": 503, "refuse": 429}.get(fault or "")
        if status is not None:
            self._answer(status, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "stall":
            time.sleep(self.server.stall_seconds)
            self.close_connection = True
            return
        connection = http.client.HTTPConnection(self.server.upstream, timeout=30)
        connection.request("GET", self.path, headers=dict(self.headers))
        response = connection.getresponse()
        body = response.read()
        connection.close()
        self.server.served(len(body))
        cut = len(body) // 2 if fault == "short" else None
        self._answer(response.status, dict(response.getheaders()), body, cut=cut)

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, *, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in {"content-length", "connection", "transfer-encoding", "server"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body if cut is None else body[:cut])
        except OSError:
            self.close_connection = True
        if cut is not None:
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


class RangeServer(ThreadingHTTPServer):
    """Serves a folder over plain HTTP with byte ranges."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__((HOST, 0), _RangeHandler)
        self.folder = folder

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.server_port}"


class _RangeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        asked = self.headers.get("Range")
        body, status = data, 200
        if asked is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            body, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        if asked is not None:
            end = int(first) + len(body) - 1
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(data)}")
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass
