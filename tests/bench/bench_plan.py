"""What one rank of a very large run pays for its plan: `make bench-plan`.

Simulates one rank of 4,096 over 10 billion samples in 1 million shards, at a global batch of
32,768, for ten tiles in the middle of an epoch. Against it, the usual way of shuffling exactly: a
permutation of all rows in memory, whose size is computed, not allocated. Prints one JSON object.

Read amplification is bytes fetched over bytes used when every run is fetched whole, in one ranged
read, and dropped when its tile ends; samples are taken as equally long.
"""

import json
import resource
import sys
import time

import numpy as np

from vlm.data.plan import Plan

NUM_SAMPLES = 10**10
NUM_SHARDS = 10**6
NUM_RANKS = 4096
GLOBAL_BATCH = 32_768
RUN_LENGTH = 64
RANK = 1234


def measure(run_length: int, *, num_tiles: int) -> dict[str, float]:
    """Time, ranged reads and amplification of one rank."""
    plan = Plan(num_samples=NUM_SAMPLES, global_batch=GLOBAL_BATCH, seed=0, run_length=run_length)
    ends = np.arange(1, NUM_SHARDS + 1, dtype=np.int64) * (NUM_SAMPLES // NUM_SHARDS)
    steps_a_tile = RUN_LENGTH
    tile = NUM_SAMPLES // (GLOBAL_BATCH * steps_a_tile) // 2
    start = tile * steps_a_tile
    seconds, rows = [], []
    for step in range(start, start + num_tiles * steps_a_tile):
        begin = time.perf_counter()
        batch = plan.rank_rows(step, rank=RANK, size=NUM_RANKS)
        np.searchsorted(ends, batch, side="right")  # the shards to read from
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = measure(RUN_LENGTH, num_tiles=10)
    shuffled = measure(1, num_tiles=10)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "num_samples": NUM_SAMPLES,
        "num_shards": NUM_SHARDS,
        "num_ranks": NUM_RANKS,
        "global_batch": GLOBAL_BATCH,
        "runs_of_64": ours,
        "single_rows": shuffled,
        "memory_added_mib": round((after - before) / 1024, 1),
        "process_mib": round(after / 1024, 1),
        "permutation_in_memory_mib": round(NUM_SAMPLES * 8 / 2**20),
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
