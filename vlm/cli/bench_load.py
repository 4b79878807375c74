"""Requests for embeddings, without a pause or at a given rate, and what became of them."""

import base64
import http.client
import io
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, urlsplit

from vlm.errors import DataError

__all__ = ["Tally", "image_bodies", "load", "pace", "text_bodies"]

_SIDE: Final = 336
_IDLE_SECONDS: Final = 2
"""After which a kept connection is not trusted: servers close idle ones, uvicorn after 5 s."""
_WORDS: Final = (
    "red",
    "green",
    "small",
    "large",
    "round",
    "old",
    "wooden",
    "apple",
    "house",
    "boat",
    "cat",
)


@dataclass
class Tally:
    """What one server did at one concurrency."""

    requests: int = 0
    refused: int = 0
    """Answers 429 and 503 with a Retry-After: the server said that it is busy."""
    seconds: float = 0
    latencies: list[float] = field(default_factory=list)
    """Seconds of each request that was answered."""

    def figures(self) -> dict[str, float]:
        """Answers a second, and latencies in milliseconds."""
        ordered = sorted(self.latencies) or [float("nan")]

        def at(fraction: float) -> float:
            return round(1000 * ordered[min(int(fraction * len(ordered)), len(ordered) - 1)], 1)

        rate = round(self.requests / self.seconds, 1) if self.seconds else 0.0
        return {"per_second": rate, "p50_ms": at(0.5), "p99_ms": at(0.99)}


def load(
    url: str,
    make: Callable[[int], bytes],
    *,
    concurrency: int,
    seconds: float,
    tally: Tally,
    key: str | None = None,
) -> None:
    """That many threads, each with one connection, ask for embeddings without a pause.

    Args:
        url: Of the server.
        make: The body of the n-th request.
        concurrency: Threads.
        seconds: After which none begins another request.
        tally: What is added to.
        key: Sent as a bearer token.

    Raises:
        DataError: If the server cannot be reached, or answers anything but 200, 429 and 503.
    """
    begin = time.perf_counter()

    def moments() -> Iterator[float | None]:
        while time.perf_counter() < begin + seconds:
            yield None

    _ask(url, make, moments(), concurrency=concurrency, tally=tally, key=key)
    tally.seconds += time.perf_counter() - begin


def pace(
    url: str,
    make: Callable[[int], bytes],
    *,
    rate: float,
    seconds: float,
    tally: Tally,
    even: bool = False,
    most: int = 256,
    key: str | None = None,
) -> None:
    """Requests at their own moments, whether or not earlier ones were answered.

    A latency counts from the moment at which the request was due, so that a slow server cannot
    make it look short by holding the client up.

    Args:
        url: Of the server.
        make: The body of the n-th request.
        rate: Requests a second.
        seconds: How long requests are due.
        tally: What is added to.
        even: Equal gaps, in place of those of people who know nothing of each other (Poisson).
        most: Threads, and so requests at once.
        key: Sent as a bearer token.

    Raises:
        DataError: As `load`.
    """
    generator = random.Random(0)
    begin = time.perf_counter() + 0.1

    def moments() -> Iterator[float | None]:
        due = 0.0
        while due < seconds:
            yield begin + due
            due += 1 / rate if even else generator.expovariate(rate)

    _ask(url, make, moments(), concurrency=most, tally=tally, key=key)
    tally.seconds += seconds


def _ask(
    url: str,
    make: Callable[[int], bytes],
    moments: Iterator[float | None],
    *,
    concurrency: int,
    tally: Tally,
    key: str | None,
) -> None:
    """Threads that take the next moment, wait for it, and ask; None: at once."""
    _address(url)  # said here, where somebody hears it, and not in a thread
    numbered, lock = zip(itertools.count(), moments, strict=False), threading.Lock()
    failures: list[str] = []

    def ask() -> None:
        line = _Line(url, key)
        try:
            while not failures:
                with lock:
                    number, due = next(numbered, (-1, None))
                if number < 0:
                    return
                answer, content, taken = line.post(make(number), due)
                with lock:
                    _count(tally, answer, taken, content, failures)
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{type(error).__name__}: {error}")
        finally:
            line.connection.close()

    threads = [threading.Thread(target=ask) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        message = f"{url}: {failures[0]}"
        raise DataError(message)


class _Line:
    """A kept connection."""

    def __init__(self, url: str, key: str | None) -> None:
        self._headers = {"content-type": "application/json"}
        self._headers |= {} if key is None else {"authorization": f"Bearer {key}"}
        address = _address(url)
        self.connection = _connection(address.scheme, address.netloc)
        self._used = 0.0

    def post(self, body: bytes, due: float | None) -> tuple[http.client.HTTPResponse, bytes, float]:
        """The answer, its content, and the seconds since it was due, which may be to come."""
        if due is not None:
            if due > self._used + _IDLE_SECONDS:
                self.connection.close()  # the server may do the same at this very moment
            time.sleep(max(0.0, due - time.perf_counter()))
        start = time.perf_counter() if due is None else due
        self.connection.request("POST", "/v1/embeddings", body, self._headers)
        answer = self.connection.getresponse()
        content = answer.read()
        self._used = time.perf_counter()
        return answer, content, self._used - start


def text_bodies() -> Callable[[int], bytes]:
    """Texts of four to eight words, every one different."""

    def make(number: int) -> bytes:
        words = [_WORDS[(number * step + step) % len(_WORDS)] for step in range(1, 4 + number % 5)]
        text = f"{' '.join(words)} {number}"
        return json.dumps({"input": text, "modality": "text"}).encode()

    return make


def image_bodies() -> Callable[[int], bytes]:
    """JPEG files of 336 x 336, every one different in its bytes.

    `modality` is for infinity-emb, which does not look at the input; others ignore it.
    """
    import numpy as np  # noqa: PLC0415 - a tenth of a second, and verbs are listed without it
    from PIL import Image  # noqa: PLC0415 - with it

    files = []
    for seed in range(16):
        coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((_SIDE, _SIDE)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())

    def make(number: int) -> bytes:
        # Bytes behind the end of a JPEG are not read, but make it another file.
        data = files[number % len(files)] + number.to_bytes(8, "big")
        url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
        return b'{"modality": "image", "input": "' + url.encode() + b'"}'

    return make


def _address(url: str) -> SplitResult:
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or not address.netloc:
        message = f"{url}: expected an address such as http://127.0.0.1:8000"
        raise DataError(message)
    return address


def _connection(scheme: str, netloc: str) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    return kind(netloc, timeout=60)


def _count(
    tally: Tally,
    answer: http.client.HTTPResponse,
    seconds: float,
    content: bytes,
    failures: list[str],
) -> None:
    if answer.status == 200:
        tally.requests += 1
        tally.latencies.append(seconds)
    elif answer.status in (429, 503) and answer.headers["retry-after"] is not None:
        tally.refused += 1
    else:
        failures.append(f"answered {answer.status}: {content[:200]!r}")
