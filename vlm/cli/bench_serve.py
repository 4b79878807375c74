"""`vlm bench-serve`, and the load that it makes."""

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

import typer
from rich.console import Console
from rich.table import Table

from vlm.cli.asking import Key, KeyFile, key_of
from vlm.errors import ConfigError, DataError

__all__ = ["Tally", "bench_serve", "image_bodies", "load", "text_bodies"]

_SIDE = 336
_WORDS = (
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
    """Answers 429 and 503: the server said that it is busy."""
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


def bench_serve(
    server: Annotated[str, typer.Argument(help="E.g. http://127.0.0.1:8000.")],
    concurrency: Annotated[str, typer.Option(help="Requests at once, several runs.")] = "1,8,32",
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Of each run.")] = 5,
    texts: Annotated[bool, typer.Option(help="Texts in place of images.")] = False,
    out: Annotated[Path | None, typer.Option(help="The figures as JSON.")] = None,
    key_file: KeyFile = None,
    key: Key = None,
) -> None:
    """Ask SERVER for embeddings without a pause, one input a request, and tell how it does.

    All inputs differ, so that no cache answers. Only ask a server that is yours.
    """
    runs = _runs(concurrency)
    make = text_bodies() if texts else image_bodies()
    token = key_of(key, key_file)
    table = Table("at once", "answers/s", "p50 ms", "p99 ms", "busy")
    report: dict[str, Any] = {"server": server, "inputs": "texts" if texts else "images"}
    for count in runs:
        tally = Tally()
        load(server, make, concurrency=count, seconds=seconds, tally=tally, key=token)
        figures = tally.figures()
        report[str(count)] = {**figures, "refused": tally.refused}
        table.add_row(str(count), *(f"{v:.1f}" for v in figures.values()), str(tally.refused))
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


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
    address = _address(url)
    headers = {"content-type": "application/json"}
    headers |= {} if key is None else {"authorization": f"Bearer {key}"}
    numbers, lock = iter(range(2**62)), threading.Lock()
    failures: list[str] = []
    end = time.perf_counter() + seconds

    def ask() -> None:
        connection = _connection(address.scheme, address.netloc)
        try:
            while not failures and time.perf_counter() < end:
                with lock:
                    number = next(numbers)
                body = make(number)
                start = time.perf_counter()
                connection.request("POST", "/v1/embeddings", body, headers)
                answer = connection.getresponse()
                content = answer.read()
                taken = time.perf_counter() - start
                with lock:
                    _count(tally, answer.status, taken, content, failures)
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{type(error).__name__}: {error}")
        finally:
            connection.close()

    start = time.perf_counter()
    threads = [threading.Thread(target=ask) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.seconds += time.perf_counter() - start
    if failures:
        message = f"{url}: {failures[0]}"
        raise DataError(message)


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


def _count(tally: Tally, status: int, seconds: float, content: bytes, failures: list[str]) -> None:
    if status == 200:
        tally.requests += 1
        tally.latencies.append(seconds)
    elif status in (429, 503):
        tally.refused += 1
    else:
        failures.append(f"answered {status}: {content[:200]!r}")


def _runs(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 1024 for part in parts):
        message = f"--concurrency {text!r}: expected numbers from 1 to 1024, e.g. 1,8,32"
        raise ConfigError(message)
    return [int(part) for part in parts]
