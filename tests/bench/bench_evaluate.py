"""Retrieval of 100,000 images among 100,000 captions, both ways, on this CPU.

    python -m tests.bench.bench_evaluate --out evaluate.json

Time and the highest resident memory of ranking everything exactly, and what memory the plain way
needs, which holds the whole matrix of similarities: in float32, with the order of its rows.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import vlm
from vlm.evaluation.ranks import paired_ranks


def main() -> None:
    """Measure once and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    arguments = parser.parse_args()
    found = measure(arguments.pairs, arguments.dim)
    text = json.dumps(found, indent=2)
    arguments.out.write_text(text + "\n")
    sys.stdout.write(f"{text}\n")


def measure(pairs: int, dim: int) -> dict[str, Any]:
    """Rank pairs of which a caption is its image with as much noise again."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(pairs, dim, generator=generator), dim=1)
    noise = F.normalize(torch.randn(pairs, dim, generator=generator), dim=1)
    texts = F.normalize(images + 4 * noise, dim=1)
    del noise
    own = torch.arange(pairs)
    start, cpu = time.perf_counter(), time.process_time()
    image_ranks, text_ranks = paired_ranks(images, texts, own, own)
    return {
        "vlm": vlm.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "pairs": pairs,
        "dim": dim,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "peak_gib": round(_peak_bytes() / 2**30, 2),
        "similarity_matrix_gib": round(pairs * pairs * 4 / 2**30, 1),
        "matrix_and_order_gib": round(pairs * pairs * (4 + 8) / 2**30, 1),
        "image_to_text_recall1": round(float((image_ranks == 0).double().mean()), 5),
        "text_to_image_recall1": round(float((text_ranks == 0).double().mean()), 5),
    }


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return 1024 * int(match[1])


if __name__ == "__main__":
    main()
