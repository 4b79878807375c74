"""A tiny untrained bundle, its application in this process, and real server processes."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.settings import ServingSettings
from tests.support import tiny_bundle
from vlm.inference import Encoder

_START_SECONDS = 120


class Server:
    """`python -m serving SETTINGS` on a free port of loopback, ready when this returns."""

    def __init__(self, *settings: str) -> None:
        self.settings = settings
        command = [sys.executable, "-m", "serving", "port=0", *settings]
        environment = {k: v for k, v in os.environ.items() if k != "VLM_SERVING_CONFIG"}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
        self.output: list[str] = []
        self.url = ""
        self._up_or_ended = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        in_time = self._up_or_ended.wait(_START_SECONDS)
        if not in_time or not self.url:
            self.process.kill()
            self.stop()
            raise AssertionError("the server did not start:\n" + "".join(self.output))
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.output.append(line)
                if found := re.search(r"running on (http://\S+)", line):
                    self.url = found.group(1)
                    self._up_or_ended.set()
        self._up_or_ended.set()

    def stop(self) -> int:
        """End the process gently, if it still runs; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self._reader.join()
        return status


@contextmanager
def running(*settings: str) -> Iterator[Server]:
    server = Server(*settings)
    try:
        with server.client:
            yield server
    finally:
        server.stop()


@contextmanager
def asking(
    server: Server, threads: int, ask: Callable[[httpx.Client, int], None]
) -> Iterator[None]:
    """That many clients ask without a pause until the block ends; what they raise is raised."""
    done = threading.Event()
    failures: list[BaseException] = []

    def repeat(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not done.is_set():
                try:
                    ask(client, number)
                except BaseException as error:  # noqa: BLE001 - raised below
                    failures.append(error)
                    return

    workers = [threading.Thread(target=repeat, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        done.set()
        for worker in workers:
            worker.join()
    if failures:
        raise failures[0]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving") / "bundle"
    tiny_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(bundle: Path) -> Encoder:
    return Encoder.load(bundle)


@pytest.fixture(scope="session")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One real process for all tests that leave it as they found it."""
    with running(f"bundle={bundle}", f"index={tmp_path_factory.mktemp('index')}") as found:
        yield found


@pytest.fixture(scope="module")
def client(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One application a test module, with an empty collection at its start."""
    settings = ServingSettings(bundle=bundle, index=tmp_path_factory.mktemp("index"))
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        yield client
