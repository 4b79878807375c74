"""Time and peak memory of the losses against open_clip's, forward and backward, on this CPU.

    python -m tests.bench.bench_loss --out loss.json --batches 1024 4096 16384 65536

Every case runs in a process of its own, so that one peak does not hide the next. Memory is the
highest resident size over that before the first run, features and their gradients included. A rival
whose matrices do not fit in what is free is not run: the record says what it would have needed.
"""

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlm.losses

# Whole float32 matrices that a rival holds at its peak, as measured at 16,384 rows.
RIVAL_MATRICES = {"open_clip.ClipLoss": 4.1, "open_clip.SigLipLoss": 5.1}
OPPONENTS = {"clip": "open_clip.ClipLoss", "siglip": "open_clip.SigLipLoss"}
CASES = ("clip", "open_clip.ClipLoss", "siglip", "open_clip.SigLipLoss", "dcl", "uniformity")


def main() -> None:
    """Measure every case at every batch size and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    results = []
    for batch in arguments.batches:
        for case in arguments.cases:
            result = _too_large(case, batch)
            if result is None:
                # Seconds for the largest batches are long enough to be measured once.
                repeats = 1 if batch > 8192 else 5
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    result = pool.apply(measure, (case, batch, arguments.dim, repeats))
            results.append(result)
            sys.stderr.write(f"{json.dumps(result)}\n")
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "float32"}
    document = {**facts, "results": results, "ratios": ratios(results)}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")


def ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds and peak memory of the rival over ours, where both were measured."""
    measured = {(r["case"], r["batch"]): r for r in results if "seconds" in r}
    return [
        {
            "case": case,
            "batch": batch,
            "speed": round(measured[OPPONENTS[case], batch]["seconds"] / ours["seconds"], 2),
            "memory": round(measured[OPPONENTS[case], batch]["peak_mib"] / ours["peak_mib"], 1),
        }
        for (case, batch), ours in measured.items()
        if case in OPPONENTS and (OPPONENTS[case], batch) in measured
    ]


def _too_large(case: str, batch: int) -> dict[str, Any] | None:
    """The record of a rival that would run out of memory."""
    needed = RIVAL_MATRICES.get(case, 0.0) * 4 * batch**2
    free = _meminfo_bytes("MemAvailable")
    if needed < 0.9 * free:
        return None
    return {
        "case": case,
        "batch": batch,
        "not_run": f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free",
    }


def measure(case: str, batch: int, dim: int, repeats: int) -> dict[str, Any]:
    """Best time and peak memory of one loss in this process."""
    torch.manual_seed(0)
    loss = build(case)
    scale = torch.tensor([14.3], requires_grad=True)
    bias = torch.tensor([-10.0], requires_grad=True)
    small = [F.normalize(torch.randn(64, dim), dim=1).requires_grad_() for _ in range(2)]
    loss(*small, scale, bias).backward()  # libraries load and threads start here
    before = _resident_bytes("VmRSS")
    leaves = [F.normalize(torch.randn(batch, dim), dim=1).requires_grad_() for _ in range(2)]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        loss(*leaves, scale, bias).backward()
        seconds.append(time.perf_counter() - start)
    peak = _resident_bytes("VmHWM") - before
    return {
        "case": case,
        "batch": batch,
        "dim": dim,
        "seconds": round(min(seconds), 4),
        "peak_mib": round(peak / 2**20, 1),
    }


def build(case: str) -> Callable[..., Tensor]:
    """The loss as a function of image rows, caption rows, scale and bias."""
    if case == "clip":
        return lambda i, t, s, b: vlm.losses.clip_loss(i, t, s)
    if case == "siglip":
        return vlm.losses.siglip_loss
    if case == "dcl":
        return lambda i, t, s, b: vlm.losses.dcl_loss(i, t, s)
    if case == "uniformity":
        return lambda i, t, s, b: vlm.losses.uniformity(i) + vlm.losses.uniformity(t)
    # Imported where it is measured: it adds to the resident size.
    from open_clip.loss import ClipLoss, SigLipLoss

    if case == "open_clip.ClipLoss":
        clip = ClipLoss()
        return lambda i, t, s, b: clip(i, t, s)
    siglip = SigLipLoss()
    return lambda i, t, s, b: siglip(i, t, s, b)


def _resident_bytes(field: str) -> int:
    return _kernel_bytes("/proc/self/status", field)


def _meminfo_bytes(field: str) -> int:
    return _kernel_bytes("/proc/meminfo", field)


def _kernel_bytes(file: str, field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path(file).read_text(encoding="ascii"))
    assert match is not None
    return 1024 * int(match[1])


if __name__ == "__main__":
    main()
