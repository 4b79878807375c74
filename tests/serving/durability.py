"""Killing a process that writes, and asking what is left: nothing acknowledged may be lost.

    python -m tests.serving.durability 100 [milvus]

In a folder of the embedded store, or in a Milvus server of its own. Each round a process upserts,
removes and moves items of one collection, tells each step before and after it, and is killed
(SIGKILL) at a random moment. What it acknowledged must be there, and of the step it was in the
middle of all or nothing. Then items are written and the collection is moved, while it is searched
without pause: no search may fail.
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from serving.services.migration import move, verify
from serving.stores import EmbeddedStore, Item, Store, parse_filter
from serving.stores.milvus import MilvusStore
from serving.stores.milvus_cluster import MilvusCluster, MilvusOptions
from tests.milvus_server import install, milvus_server
from vlm.files import is_url

__all__ = ["searches_while_written", "survives"]

DIM = 8
BATCH = 5
_UNDER_WAY_SECONDS = 0.3
"""For what a client sent before it was killed to be done by a server, which lives on."""
State = dict[str, int]
"""By id the number of the step that wrote it."""


def survives(place: str, rounds: int, *, seed: int = 0, longest: float = 0.6) -> int:
    """Kill a writer again and again; returns how many of its steps were acknowledged.

    Args:
        place: A folder, or the address of a Milvus server.
        rounds: How many writers are killed.
        seed: Of the steps and of the moments.
        longest: Seconds that one writes at most.

    Raises:
        AssertionError: If something acknowledged is gone, or half of a step is seen.
    """
    rng = random.Random(seed)
    expected: State = {}
    acknowledged = first = 0
    for number in range(rounds):
        begun, done = _killed(place, seed=seed + number, first=first, rng=rng, longest=longest)
        before = dict(expected)
        for step in done:
            _apply(before, step)
        after = dict(before)
        for step in begun[len(done) :]:  # at most the one that was going on
            _apply(after, step)
        expected = _state(place)
        assert expected in (before, after), f"round {number}: a step was lost or half done"
        acknowledged += len(done)
        first += len(begun)
    source, target = (opened(place, name) for name in ("items", "copy"))
    move(source, target)
    verify(source, target)
    return acknowledged


def searches_while_written(place: str, items: int) -> int:
    """Search while items are written, indexed and moved; returns how many searches there were.

    Raises:
        AssertionError: If a search failed, or missed an item that was there all the time.
    """
    store, copy = opened(place, "written"), opened(place, "moved")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((items, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    new = [
        Item(id=f"{n:06d}", vector=row, text=f"word{n % 7}", metadata={"n": n % 10})
        for n, row in enumerate(rows)
    ]
    store.upsert(new[:BATCH])
    ended, searches = threading.Event(), 0
    failures: list[BaseException] = []

    def search() -> None:
        nonlocal searches
        try:
            while not ended.is_set():
                assert store.search(rows[0], 1)[0].id == new[0].id
                assert store.search(rows[0], 1, parse_filter({"n": 0}))[0].id == new[0].id
                assert store.search_captions("word0", 3)
                searches += 3
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            failures.append(error)

    thread = threading.Thread(target=search)
    thread.start()
    try:
        for start in range(BATCH, items, 50):
            store.upsert(new[start : start + 50])
        store.build_index()
        move(store, copy)
    finally:
        ended.set()
        thread.join()
    assert not failures, failures
    assert verify(store, copy)[0] == items
    return searches


def opened(place: str, name: str) -> Store:
    fingerprint = "d" * 64
    if not is_url(place):
        return EmbeddedStore(Path(place) / name, fingerprint=fingerprint, dim=DIM)
    cluster = MilvusCluster(MilvusOptions(uri=place))
    return MilvusStore(cluster, name, fingerprint=fingerprint, dim=DIM)


def write(place: str, seed: int, first: int) -> None:
    """What the process does until it is killed."""
    rng = random.Random(seed)
    store, copy = opened(place, "items"), opened(place, "copy")
    for number in range(first, first + 10_000):
        kind = rng.choice(["upsert", "upsert", "upsert", "delete", "filter", "move", "optimize"])
        step = {"kind": kind, "number": number, "slot": rng.randrange(8)}
        sys.stdout.write("begin " + json.dumps(step) + "\n")
        sys.stdout.flush()
        _do(store, copy, step)
        sys.stdout.write("done\n")
        sys.stdout.flush()


def _do(store: Store, copy: Store, step: dict[str, object]) -> None:
    kind, number, slot = step["kind"], int(str(step["number"])), int(str(step["slot"]))
    if kind == "upsert":
        row = np.eye(DIM, dtype=np.float32)[number % DIM]
        metadata = {"step": number, "slot": slot}
        store.upsert([Item(id=i, vector=row, metadata=metadata) for i in _ids(slot)])
    elif kind == "delete":
        store.delete(_ids(slot))
    elif kind == "filter":
        store.delete_where(parse_filter({"slot": slot}))
    elif kind == "move":
        move(store, copy)
    else:
        store.optimize()


def _apply(state: State, step: dict[str, object]) -> None:
    slot = int(str(step["slot"]))
    if step["kind"] == "upsert":
        state.update(dict.fromkeys(_ids(slot), int(str(step["number"]))))
    elif step["kind"] in ("delete", "filter"):
        for item_id in _ids(slot):
            state.pop(item_id, None)


def _ids(slot: int) -> list[str]:
    return [f"{slot}-{n}" for n in range(BATCH)]


def _state(place: str) -> State:
    if is_url(place):
        time.sleep(_UNDER_WAY_SECONDS)
    items = opened(place, "items").scan(1000)
    return {item.id: item.metadata["step"] for item in items}


def _killed(
    place: str, *, seed: int, first: int, rng: random.Random, longest: float
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """The steps that one writer began, and those of them that it acknowledged."""
    command = [sys.executable, "-m", "tests.serving.durability", place, str(seed), str(first)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline()]  # it has begun
    time.sleep(rng.uniform(0, longest))
    process.kill()
    lines += process.stdout.read().splitlines()
    process.stdout.close()
    process.wait()
    begun = [json.loads(line[6:]) for line in lines if line.startswith("begin ") and "}" in line]
    return begun, begun[: sum(line.strip() == "done" for line in lines)]


def main() -> None:
    """Either what a process that is killed does, or the rounds and the searches."""
    if len(sys.argv) == 4:
        write(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        return
    count, kind = int(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else "embedded"
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        place = name
        if kind == "milvus":
            problem = install()
            if problem is not None:
                raise SystemExit(problem)
            place = stack.enter_context(milvus_server(Path(name) / "server")).uri
        steps = survives(place, count, longest=2.0 if kind == "milvus" else 0.6)
        told = f"{kind}: {count} kills, {steps} acknowledged steps: none lost, none half done"
        sys.stdout.write(told + "\n")
        if kind == "milvus":
            return
        items = 100 * count
        searches = searches_while_written(place, items)
        sys.stdout.write(
            f"{searches} searches while {items} items were written and moved: none failed\n"
        )


if __name__ == "__main__":
    main()
