"""Requests for embeddings, without a pause or at a given rate, and what became of them.

One thread holds all connections, so that the load costs the machine little beside the server: a
thread for each took a third of a millisecond a request, and woke up for every answer.
"""

import asyncio
import base64
import io
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, urlsplit

from vlm.errors import DataError

__all__ = ["Tally", "image_bodies", "load", "pace", "text_bodies"]

_SIDE: Final = 336
_ANSWER_SECONDS: Final = 60
"""Longest wait for one."""
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
    """That many connections ask for embeddings without a pause.

    Args:
        url: Of the server.
        make: The body of the n-th request.
        concurrency: Connections, and so requests at once.
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
        most: Connections, and so requests at once.
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
    """Connections that take the next moment, wait for it, and ask; None: at once."""
    address = _address(url)
    numbered = zip(itertools.count(), moments, strict=False)

    async def ask() -> None:
        with closing(_Line(address, key)) as line:
            for number, due in numbered:
                await line.wait(due)
                start = time.perf_counter() if due is None else due
                async with asyncio.timeout(_ANSWER_SECONDS):
                    answer = await line.post(make(number))
                _count(tally, answer, time.perf_counter() - start)

    async def ask_all() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(ask())

    failure: Exception | None = None
    try:
        asyncio.run(ask_all())
    except* (OSError, EOFError, asyncio.LimitOverrunError, ValueError, LookupError) as group:
        failure = group.exceptions[0]
    if failure is not None:
        message = f"{url}: {_said(failure)}"
        raise DataError(message) from failure


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: dict[str, str]
    content: bytes


class _RefusedError(ValueError):
    """An answer that is neither the rows nor a word of being busy."""


def _said(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_ANSWER_SECONDS} s"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)  # asyncio's own text tells the call, not the reason
    return str(error) if isinstance(error, _RefusedError) else repr(error)


class _Line:
    """A connection that is kept, made when it is needed, and made anew when it was closed."""

    def __init__(self, address: SplitResult, key: str | None) -> None:
        self._address = address
        authorization = "" if key is None else f"authorization: Bearer {key}\r\n"
        self._head = (
            f"POST {address.path.rstrip('/')}/v1/embeddings HTTP/1.1\r\nhost: {address.netloc}\r\n"
            f"content-type: application/json\r\n{authorization}content-length: "
        ).encode()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used = 0.0

    async def wait(self, due: float | None) -> None:
        """Until a moment; None: not at all."""
        if due is None:
            return
        if due > self._used + _IDLE_SECONDS:
            self.close()  # the server may do the same at this very moment
        await asyncio.sleep(max(0.0, due - time.perf_counter()))

    async def post(self, body: bytes) -> _Answer:
        """What is answered to a body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(
                self._address.hostname,
                self._address.port or (443 if self._address.scheme == "https" else 80),
                ssl=self._address.scheme == "https" or None,
            )
        reader, writer = self._streams
        writer.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
        if headers.get("transfer-encoding", "").lower() == "chunked":
            content = await _chunks(reader)
        else:
            content = await reader.readexactly(int(headers["content-length"]))
        self._used = time.perf_counter()
        if headers.get("connection", "").lower() == "close":
            self.close()
        return _Answer(status, headers, content)

    def close(self) -> None:
        """What is asked next has a connection of its own."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _head(text: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers, whose names are in lower case."""
    first, *lines = text.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(first.split(" ", 2)[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readuntil(b"\r\n")
    return b"".join(parts)


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
    if address.scheme not in ("http", "https") or not address.hostname:
        message = f"{url}: expected an address such as http://127.0.0.1:8000"
        raise DataError(message)
    return address


def _count(tally: Tally, answer: _Answer, seconds: float) -> None:
    if answer.status == 200:
        tally.requests += 1
        tally.latencies.append(seconds)
    elif answer.status in (429, 503) and "retry-after" in answer.headers:
        tally.refused += 1
    else:
        message = f"answered {answer.status}: {answer.content[:200]!r}"
        raise _RefusedError(message)
