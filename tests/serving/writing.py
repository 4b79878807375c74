"""Searching a server without a pause while its collection is written and given another model.

    python -m tests.serving.writing 10000

No search may fail, and none may miss what was acknowledged before it was asked.
"""

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.serving.conftest import Server, asking, running
from tests.support import tiny_bundle

__all__ = ["Watched", "searched_while_written", "serving_two_models"]

CLIENTS = 2
BATCH = 40


@dataclass
class Watched:
    """What the clients saw."""

    acknowledged: int = 0
    """Items, numbered from 0."""
    seconds: list[float] = field(default_factory=list)
    """Of each search."""


def serving_two_models(folder: Path, *, exact_below: int) -> list[str]:
    """Settings of a server with a second model, to which its collection can be moved."""
    tiny_bundle(folder / "bundle")
    tiny_bundle(folder / "models" / "other", seed=5)
    return [
        f"bundle={folder / 'bundle'}", f"index={folder / 'index'}", f"exact_below={exact_below}",
        f"models={folder / 'models'}", "preload=[other]",
    ]  # fmt: skip


def searched_while_written(server: Server, count: int, migrate: Callable[[], object]) -> Watched:
    """Write `count` items and migrate them, while clients search.

    Raises:
        AssertionError: If a search fails, or misses what was acknowledged before.
    """
    watched = Watched()
    numbers = itertools.count()

    def ask(client: httpx.Client, _: int) -> None:
        known, start = watched.acknowledged, time.perf_counter()
        newest = f"i{known - 1:06d}"
        questions: list[dict[str, Any]] = [
            {"text": f"note {known}"},
            {"text": "note", "filter": {"n": known - 1}},
            {"id": newest, "limit": 3},
            {"text": "note", "words": "seven", "filter": {"n": {"lt": known}}},
        ]
        body = questions[next(numbers) % len(questions)]
        answer = client.post("/v1/search", json=body)
        watched.seconds.append(time.perf_counter() - start)
        assert answer.status_code == 200, (body, answer.text)
        found = answer.json()
        assert found["items"] >= known, (body, found["items"], known)
        ids = [hit["id"] for hit in found["results"]]
        if body.get("filter") == {"n": known - 1}:
            assert ids == [newest], (body, ids)

    def write(first: int) -> None:
        items = [
            {"id": f"i{n:06d}", "text": f"note {n} seven", "metadata": {"n": n}}
            for n in range(first, min(first + BATCH, count))
        ]
        answer = server.client.post("/v1/items", json={"items": items})
        assert answer.status_code == 201, answer.text
        watched.acknowledged = first + len(items)

    write(0)
    with asking(server, CLIENTS, ask):
        for first in range(BATCH, count, BATCH):
            write(first)
        _wait_until_measured(server)
        migrate()
    assert server.client.get("/v1/collections/default").json()["name"] == "second"
    return watched


def _wait_until_measured(server: Server) -> None:
    """The background has built an index of what was written, and compared it with exact search."""
    end = time.monotonic() + 120
    while server.client.get("/v1/collections/default").json()["measurement"] is None:
        assert time.monotonic() < end, "the collection was not measured"
        time.sleep(0.1)


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [
            sys.executable, "-m", "vlm", "index", "migrate", "second",
            "--bundle", str(folder / "models" / "other"), "--index", str(folder / "index"),
        ]  # fmt: skip
        with running(*serving_two_models(folder, exact_below=2000)) as server:
            start = time.perf_counter()
            watched = searched_while_written(
                server, count, lambda: subprocess.run(command, check=True, capture_output=True)
            )
            elapsed = time.perf_counter() - start
    seconds = sorted(watched.seconds)
    middle, slow = (1000 * seconds[int(q * (len(seconds) - 1))] for q in (0.5, 0.99))
    sys.stdout.write(
        f"{count} items written and migrated in {elapsed:.0f} s, while {len(seconds)} searches "
        f"were answered: none failed; {middle:.0f} ms in the middle, {slow:.0f} ms at the 99th "
        f"percentile, {1000 * seconds[-1]:.0f} ms at most\n"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
