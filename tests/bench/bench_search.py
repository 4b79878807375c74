"""Our search against FAISS-HNSW and LanceDB's defaults, cross-modal too: `make bench-search`.

    python -m tests.bench.bench_search --items 200000 --out build/bench-search.json

Items are unit vectors in clusters, moved into a cone as pictures are; queries `image` lie in the
same cone, queries `text` in another one, with `--gap` between the two centroids: give the
`centroid_gap` of an evaluation report. `filtered` are texts of which a tenth of the items fulfils
the filter. Exact search is the oracle for all of them.

Every engine runs in a process of its own, one after another: its build, its disk, the peak of its
memory, then latency of one client and rate of two. FAISS is not a dependency; with none in
`--faiss` (a folder of pip install --target) it is left out. Milvus is a real server with its own
settings, but for interim indexes; the peak of its memory is the server's.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from lancedb.index import IvfPq

from serving.services.recall import Measurement, QueryKind, tune
from serving.stores import Effort, EmbeddedStore, Filter, Item, Store, parse_filter
from serving.stores.milvus import MilvusStore
from serving.stores.milvus_cluster import MilvusCluster, MilvusOptions
from tests.milvus_server import install, milvus_server

ENGINES: Final = ("ours", "milvus", "lancedb defaults", "faiss hnsw", "faiss flat")
DIM: Final = 512
LIMIT: Final = 10
QUERIES: Final = 200
CHUNK: Final = 4096
Search = Callable[[np.ndarray, bool], list[int]]
"""Row numbers of the nearest, of the whole collection or of its filtered tenth."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--gap", type=float, default=0.8)
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--seconds", type=float, default=10, help="of the test with two clients")
    parser.add_argument("--faiss", type=Path, default=Path("build/faiss"))
    parser.add_argument("--only", choices=ENGINES, action="append", help="these engines alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        sys.stdout.write(json.dumps(run_engine(options)) + "\n")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_vectors(folder, options.items, options.gap)
        engines = {each: in_process(each, folder, options) for each in options.only or ENGINES}
    report = {
        "items": options.items, "dim": DIM, "gap": options.gap, "target": options.target,
        "limit": LIMIT, "queries_of_each_kind": QUERIES, "cores": os.cpu_count(),
        "engines": engines,
    }  # fmt: skip
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def write_vectors(folder: Path, items: int, gap: float) -> None:
    """Items and queries, and what exact search finds, as arrays that engines map into memory."""
    rng = np.random.default_rng(0)
    centres = unit(rng.standard_normal((max(10, items // 200), DIM), np.float32))
    axes = unit(rng.standard_normal((2, DIM), np.float32))
    axes[1] = unit(axes[1] - (axes[0] @ axes[1]) * axes[0])
    # Means at distance g on orthogonal axes: g^2 = 2 c^2 / (1 + c^2) for rows of norm(z + c axis).
    cone = gap / np.sqrt(2 - gap**2)

    def meanings(count: int) -> np.ndarray:
        noise = unit(rng.standard_normal((count, DIM), np.float32))
        return unit(centres[rng.integers(len(centres), size=count)] + 0.8 * noise)

    rows = np.lib.format.open_memmap(
        folder / "items.npy", mode="w+", dtype=np.float32, shape=(items, DIM)
    )
    for start in range(0, items, CHUNK):
        count = min(CHUNK, items - start)
        rows[start : start + count] = unit(meanings(count) + cone * axes[0])
    queries = {
        "text": unit(meanings(QUERIES) + cone * axes[1]),
        "image": unit(meanings(QUERIES) + cone * axes[0]),
        "tuning_text": unit(meanings(64) + cone * axes[1]),
        "tuning_image": unit(meanings(64) + cone * axes[0]),
    }
    tenth = np.arange(0, items, 10)
    truth = {
        "text": nearest(rows, queries["text"]),
        "image": nearest(rows, queries["image"]),
        "filtered": tenth[nearest(rows[tenth], queries["text"])],
    }
    np.savez(folder / "queries.npz", **queries)  # type: ignore[arg-type] # not allow_pickle
    np.savez(folder / "truth.npz", **truth)


def nearest(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    scores = queries @ np.asarray(rows).T
    best = np.argpartition(-scores, LIMIT, axis=1)[:, :LIMIT]
    return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), 1), 1)


def unit(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return found.astype(np.float32)


def in_process(engine: str, folder: Path, options: argparse.Namespace) -> Any:
    command = [sys.executable, "-m", "tests.bench.bench_search", "--engine", engine]
    command += ["--folder", str(folder), "--items", str(options.items)]
    command += ["--target", str(options.target), "--seconds", str(options.seconds)]
    command += ["--faiss", str(options.faiss)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_engine(options: argparse.Namespace) -> Any:
    rows = np.load(options.folder / "items.npy", mmap_mode="r")
    queries = np.load(options.folder / "queries.npz")
    where = options.folder / options.engine.replace(" ", "-")
    start = time.perf_counter()
    store: Store
    if options.engine.startswith("faiss"):
        if not options.faiss.is_dir():
            return {"left_out": f"no FAISS in {options.faiss}"}
        sys.path.append(str(options.faiss))
        settings, told = faiss_settings(options.engine, rows, where)
    elif options.engine == "milvus":
        problem = install()
        if problem is not None:
            return {"left_out": problem}
        with milvus_server(where, production=True) as server:
            cluster = MilvusCluster(MilvusOptions(uri=server.uri, timeout_seconds=300))
            store = MilvusStore(cluster, "bench", fingerprint="0" * 64, dim=DIM)
            settings, told = tuned_settings(options, rows, queries, store)
            return told | results(options, settings, start, where) | {"peak_rss_mb": server.peak_mb}
    else:
        store = EmbeddedStore(where, fingerprint="0" * 64, dim=DIM)
        settings, told = tuned_settings(options, rows, queries, store)
    return told | results(options, settings, start, where)


def results(
    options: argparse.Namespace, settings: dict[str, Search], start: float, where: Path
) -> dict[str, Any]:
    queries = np.load(options.folder / "queries.npz")
    told: dict[str, Any] = {}
    told["build_seconds"] = round(time.perf_counter() - start, 1)
    told["disk_mb"] = round(size_of(where) / 1e6, 1)
    truth = np.load(options.folder / "truth.npz")
    told["settings"] = {
        name: judged(search, queries, truth, options.seconds) for name, search in settings.items()
    }
    told["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return told


def judged(search: Search, queries: Any, truth: Any, seconds: float) -> dict[str, Any]:
    recall = {}
    times: list[float] = []
    for kind, exact in truth.items():
        found = 0
        for query, wanted in zip(
            queries["image" if kind == "image" else "text"], exact, strict=True
        ):
            start = time.perf_counter()
            ids = search(query, kind == "filtered")
            if kind == "text":
                times.append(1000 * (time.perf_counter() - start))
            found += len(set(ids) & set(wanted.tolist()))
        recall[kind] = round(found / exact.size, 4)
    return {
        "recall": recall,
        "p50_ms": round(float(np.percentile(times, 50)), 2),
        "p99_ms": round(float(np.percentile(times, 99)), 2),
        "qps_2_clients": round(rate(search, queries["text"], seconds), 1),
    }


def rate(search: Search, queries: np.ndarray, seconds: float) -> float:
    counts = [0, 0]
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        while time.perf_counter() < end:
            search(queries[(counts[number] * 2 + number) % len(queries)], False)
            counts[number] += 1

    threads = [threading.Thread(target=client, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def tuned_settings(
    options: argparse.Namespace, rows: np.ndarray, queries: Any, store: Store
) -> tuple[dict[str, Search], dict[str, Any]]:
    for start in range(0, len(rows), CHUNK):
        store.upsert(
            [
                Item(id=f"{n:09d}", vector=rows[n], metadata={"tenth": n % 10})
                for n in range(start, min(start + CHUNK, len(rows)))
            ]
        )
    tenth = parse_filter({"tenth": 0})
    if options.engine == "lancedb defaults":
        assert isinstance(store, EmbeddedStore)
        return {"defaults": defaults_of(store)}, {}
    known: dict[QueryKind, np.ndarray] = {
        "text": queries["tuning_text"],
        "image": queries["tuning_image"],
    }
    measured: Measurement = tune(store, known, target=options.target, known=None)
    effort = measured.chosen.effort

    def search(query: np.ndarray, is_filtered: bool, effort: Effort | None = effort) -> list[int]:
        # What the service does: few items left by a filter are searched exactly.
        where: Filter = tenth if is_filtered else ()
        if is_filtered and store.count(where) < 20_000:
            effort = None
        return [int(hit.id) for hit in store.search(query, LIMIT, where, effort=effort)]

    told = {"chosen": asdict(measured.chosen), "curve": [asdict(p) for p in measured.curve]}
    return {"tuned": search, "exact": lambda q, f: search(q, f, None)}, told


def defaults_of(store: EmbeddedStore) -> Search:
    table = store._table  # what `create_index` and `search` do when nothing is said
    table.create_index("vector", config=IvfPq(distance_type="cosine"))

    def search(query: np.ndarray, is_filtered: bool) -> list[int]:
        asked = table.search(query, vector_column_name="vector").distance_type("cosine")
        asked = asked.select(["id", "_distance"]).limit(LIMIT)
        if is_filtered:
            asked = asked.where("array_has(facets, '\"tenth\"=0')", prefilter=True)
        return [int(row["id"]) for row in asked.to_list()]

    return search


def faiss_settings(
    engine: str, rows: np.ndarray, folder: Path
) -> tuple[dict[str, Search], dict[str, Any]]:
    faiss: Any = importlib.import_module("faiss")
    flat = engine == "faiss flat"
    metric = faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexFlatIP(DIM) if flat else faiss.IndexHNSWFlat(DIM, 32, metric)
    index.add(np.ascontiguousarray(rows))
    folder.mkdir()
    faiss.write_index(index, str(folder / "index"))
    tenth = faiss.IDSelectorBatch(np.arange(0, len(rows), 10))

    def at(effort: int) -> Search:
        def search(query: np.ndarray, is_filtered: bool) -> list[int]:
            kind = faiss.SearchParameters if flat else faiss.SearchParametersHNSW
            parameters = kind(sel=tenth) if is_filtered else kind()
            if not flat:
                parameters.efSearch = effort
            return index.search(query[None], LIMIT, params=parameters)[1][0].tolist()

        return search

    return {"exact": at(0)} if flat else {f"ef {ef}": at(ef) for ef in (16, 64, 256)}, {}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
