"""Time and peak memory of the losses against open_clip's, forward and backward, on this CPU.

    python -m tests.bench.bench_loss --out loss.json --batches 4096 16384 65536
    python -m tests.bench.bench_loss --out loss.json --table

Every case runs in a process of its own, so that one peak does not hide the next. Memory is the
highest resident size over that before the first run, features and their gradients included. A rival
whose matrices do not fit in what is free is not run: the record says what it would have needed.
Records are added to the file one by one, and one of the same case, batch and threads is replaced:
the whole may be measured in parts, each a few minutes long.
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
from vlm.files import write_text_whole

# Whole float32 matrices that a rival holds at its peak, as measured at 16,384 rows.
RIVAL_MATRICES = {"open_clip.ClipLoss": 4.1, "open_clip.SigLipLoss": 5.1}
OPPONENTS = {"clip": "open_clip.ClipLoss", "siglip": "open_clip.SigLipLoss"}
CASES = ("clip", "open_clip.ClipLoss", "siglip", "open_clip.SigLipLoss", "dcl", "uniformity")


def main() -> None:
    """Measure every case at every batch size into one JSON file, or print it as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text())["results"] if arguments.out.is_file() else []
    if arguments.table:
        sys.stdout.write(table(results))
        return
    for batch in arguments.batches:
        for case in arguments.cases:
            result = _too_large(case, batch)
            if result is None:
                # Seconds for the largest batches are long enough to be measured once.
                repeats = 1 if batch > 8192 else 5
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    result = pool.apply(measure, (case, batch, arguments.dim, repeats))
            result["threads"] = torch.get_num_threads()
            same = {key: result[key] for key in ("case", "batch", "threads")}
            results = [old for old in results if not same.items() <= old.items()] + [result]
            sys.stderr.write(f"{json.dumps(result)}\n")
            document = {"torch": torch.__version__, "dtype": "float32", "results": results}
            write_text_whole(arguments.out, json.dumps(document, indent=2) + "\n")


def table(results: list[dict[str, Any]]) -> str:
    """The records as Markdown: each loss of ours beside its rival."""
    lines = [
        "| rows | loss | threads | ours | open_clip | time, ours/theirs | memory, theirs/ours |",
        "|---" * 7 + "|",
    ]
    found = {(r["case"], r["batch"], r["threads"]): r for r in results}
    for (case, batch, threads), ours in sorted(found.items(), key=lambda item: item[0][1]):
        if case.startswith("open_clip"):
            continue
        theirs = found.get((OPPONENTS.get(case, ""), batch, threads), {})
        both = "seconds" in ours and "seconds" in theirs
        cells = [f"{batch:,}", case, str(threads), _cell(ours), _cell(theirs)]
        cells.append(f"{ours['seconds'] / theirs['seconds']:.2f}" if both else "")
        cells.append(f"{theirs['peak_mib'] / ours['peak_mib']:.1f}" if both else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(record: dict[str, Any]) -> str:
    if "seconds" in record:
        return f"{record['seconds']:.3g} s, {record['peak_mib']:,.0f} MiB"
    return record.get("not_run", "")


def _too_large(case: str, batch: int) -> dict[str, Any] | None:
    """The record of a rival that would run out of memory."""
    needed = RIVAL_MATRICES.get(case, 0.0) * 4 * batch**2
    free = _meminfo_bytes("MemAvailable")
    if needed < 0.9 * free:
        return None
    return {
        "case": case,
        "batch": batch,
        "not_run": f"does not fit: {needed / 2**30:.0f} GiB of {free / 2**30:.0f} free",
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
