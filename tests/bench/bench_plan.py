"""What one rank of a very large run pays for its plan: `make bench-plan`.

Simulates one rank of 4,096 over 10 billion samples in 1 million shards, at a global batch of
32,768, for ten tiles in the middle of an epoch. The manifest is opened from disk as in training: a
table of 1 million shards, and an index of 400 GB that is one hole, so that it takes no room; a
batch includes looking up shard and index entry of each of its samples. Against it, the usual way
of shuffling exactly: a permutation of all rows in memory, whose size is computed, not allocated.
Prints one JSON object.

Read amplification is bytes fetched over bytes used when every run is fetched whole, in one ranged
read, and dropped when its tile ends; samples are taken as equally long.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vlm.data.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, open_manifest, shard_dtype
from vlm.data.plan import Plan
from vlm.data.scan import INDEX_DTYPE

NUM_SAMPLES = 10**10
NUM_SHARDS = 10**6
NUM_RANKS = 4096
GLOBAL_BATCH = 32_768
RUN_LENGTH = 64
RANK = 1234


def write_manifest(folder: Path) -> None:
    """What `vlm data index` would leave, but for the entries of samples, which are a hole."""
    table = np.zeros(NUM_SHARDS, dtype=shard_dtype(name_bytes=16))
    table["name"] = [f"part-{number:07d}.tar".encode() for number in range(NUM_SHARDS)]
    table["num_samples"] = NUM_SAMPLES // NUM_SHARDS
    np.save(folder / "shards.npy", table)
    with (folder / "index.npy").open("wb") as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(INDEX_DTYPE),
            "fortran_order": False,
            "shape": (NUM_SAMPLES,),
        }
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + NUM_SAMPLES * INDEX_DTYPE.itemsize)
    tree = {"version": FORMAT_VERSION, "fingerprint": "0" * 64, "num_samples": NUM_SAMPLES}
    (folder / MANIFEST_NAME).write_text(json.dumps(tree))


def measure(manifest: Manifest, run_length: int, *, num_tiles: int) -> dict[str, float]:
    """Time, ranged reads and amplification of one rank."""
    plan = Plan(
        num_samples=manifest.num_samples,
        global_batch=GLOBAL_BATCH,
        seed=0,
        run_length=run_length,
    )
    steps_a_tile = RUN_LENGTH
    tile = NUM_SAMPLES // (GLOBAL_BATCH * steps_a_tile) // 2
    start = tile * steps_a_tile
    seconds, rows = [], []
    for step in range(start, start + num_tiles * steps_a_tile):
        begin = time.perf_counter()
        batch = plan.rank_rows(step, rank=RANK, size=NUM_RANKS)
        for row in batch.tolist():
            manifest.locate(row)
        seconds.append(time.perf_counter() - begin)
        rows.append(batch)
    used = np.concatenate(rows)
    runs = np.unique(used // run_length)
    return {
        "milliseconds_a_batch_median": round(float(np.median(seconds)) * 1e3, 4),
        "milliseconds_a_batch_p99": round(float(np.quantile(seconds, 0.99)) * 1e3, 4),
        "samples_used": len(used),
        "ranged_reads": len(runs),
        "samples_a_read": round(len(used) / len(runs), 2),
        "read_amplification": round(len(runs) * run_length / len(used), 4),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own, so that its memory is not counted.
        writer = multiprocessing.get_context("spawn").Process(target=write_manifest, args=(folder,))
        writer.start()
        writer.join()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        manifest = open_manifest(folder)
        opened = time.perf_counter() - begin
        ours = measure(manifest, RUN_LENGTH, num_tiles=10)
        shuffled = measure(manifest, 1, num_tiles=10)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "num_samples": NUM_SAMPLES,
        "num_shards": NUM_SHARDS,
        "num_ranks": NUM_RANKS,
        "global_batch": GLOBAL_BATCH,
        "seconds_to_open_manifest": round(opened, 3),
        "runs_of_64": ours,
        "single_rows": shuffled,
        "memory_added_mib": round((after - before) / 1024, 1),
        "process_mib": round(after / 1024, 1),
        "permutation_in_memory_mib": round(NUM_SAMPLES * 8 / 2**20),
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
