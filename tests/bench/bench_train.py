"""Samples a second and peak memory of training against open_clip's trainer: `make bench-train`.

    python -m tests.bench.bench_train [--out FILE] [--rounds N] [--steps N] [--only CASE] …

Both train the same model in fp32 with AdamW on the same shards, batch and threads, each side in a
process of its own, in turns. open_clip's is `open_clip_train.main` itself, patched where it would
not run here: a stand-in for pandas, and its grouping of members, which stops at an entry that
webdataset 1 adds. Steps are timed by each trainer's own log, waiting for data included, the first
two left out; memory is the sum of proportional set sizes of a process and its children, at its
highest. `b32 full` has captions that fill all 77 tokens, so that trimming them gains nothing.
"""

import argparse
import importlib.machinery
import json
import logging
import multiprocessing
import re
import sys
import tempfile
import threading
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import vlm  # noqa: F401 - mends torchvision before open_clip imports it
from tests.bench.bench_data import _watch
from tests.support import drawn_samples
from vlm.config import load_config, validate_config
from vlm.data.manifest import build_manifest, open_manifest
from vlm.data.write import write_shards

WORKERS = 2
LEFT_OUT = 2
DEMO = Path(__file__).parents[2] / "configs/train/demo.yaml"
_B32: dict[str, Any] = {
    "batch": 8,
    "size": 224,
    "context": 77,
    "model": {
        "dim": 512,
        "image": {"type": "vit", "width": 768, "layers": 12, "patch_size": 32},
        "text": {"type": "transformer", "width": 512, "layers": 12, "heads": 8},
    },
}
CASES: dict[str, dict[str, Any]] = {
    "demo": {"batch": 256, "size": 48, "context": 24, "model": None},
    "b32": _B32,
    "b32 full": {**_B32, "words": 80},
}


def main() -> None:
    """Write the shards, train on each side in turns, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", choices=sorted(CASES), action="append")
    arguments = parser.parse_args()
    results = {}
    for name, case in CASES.items():
        if name in (arguments.only or CASES):
            results[name] = compare(case, arguments.rounds, arguments.steps)
    text = json.dumps(results, indent=2)
    sys.stdout.write(text + "\n")
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def compare(case: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """Both sides in turns, so that neither has the quieter machine; medians, and of ratios too."""
    found: dict[str, list[dict[str, float]]] = {"open_clip": [], "ours": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "shards"
        samples = drawn_samples(case["batch"] * (steps + 2))
        if "words" in case:
            samples = [
                replace(s, text=" ".join([s.text, *["very"] * case["words"]])) for s in samples
            ]
        write_shards(samples, folder, prefix="drawn", samples_per_shard=case["batch"])
        build_manifest(folder)
        for number in range(rounds):
            for name, side in (("open_clip", _open_clip), ("ours", _ours)):
                out = Path(scratch) / f"{name}{number}"
                found[name].append(_in_process(partial(side, case, folder, out, steps)))
                sys.stderr.write(f"{name} {found[name][-1]}\n")
    ratios = {
        key: float(np.median([a[key] / b[key] for a, b in zip(*pair, strict=True)]))
        for key, pair in (
            ("samples_a_second", (found["ours"], found["open_clip"])),
            ("peak_mib", (found["ours"], found["open_clip"])),
        )
    }
    medians = {
        name: {key: round(float(np.median([r[key] for r in runs])), 1) for key in runs[0]}
        for name, runs in found.items()
    }
    return {**medians, "ours_to_open_clip": {key: round(r, 2) for key, r in ratios.items()}}


def _in_process(side: Any) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(side, sender))
    process.start()
    sender.close()  # so that a process that dies is noticed
    peak, stop = [0.0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, stop))
    watcher.start()
    try:
        rate = receiver.recv()
    finally:
        stop.set()
        watcher.join()
        process.join()
    return {"samples_a_second": rate, "peak_mib": peak[0] / 1024}


def _run(side: Any, sender: Any) -> None:
    # open_clip's workers are forked: its pipeline holds functions that cannot be pickled.
    multiprocessing.set_start_method("fork", force=True)
    sender.send(side())


def _model(case: dict[str, Any]) -> Any:
    from vlm.models import DualEncoderConfig
    from vlm.train import TrainConfig

    if case["model"] is None:
        return load_config(TrainConfig, DEMO, []).model
    return DualEncoderConfig.model_validate(case["model"])


def _ours(case: dict[str, Any], folder: Path, out: Path, steps: int) -> float:
    from vlm.distributed import World
    from vlm.train import TrainConfig, train

    tree = {
        "name": "run",
        "output": str(out),
        "steps": steps,
        "global_batch": case["batch"],
        "image": {"size": case["size"]},
        "tokenizer": {"context_length": case["context"]},
        "data": {
            "shards": str(folder),
            "stream": {"threads": WORKERS, "cache_bytes": 0},
            "augment": {"min_scale": 0.9},
        },
        "model": _model(case).model_dump(),
        "loss": [{"type": "clip"}],
        "optim": {"type": "adamw", "lr": 1e-4},
        "engine": {"type": "torch", "precision": "fp32"},
        "log_every": 1,
        "checkpoint_every": 10**6,
    }
    config = validate_config(TrainConfig, tree, source="bench")
    train(config, world=World(), console=Console(quiet=True), resume=False)
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["samples_per_second"] for line in lines]
    return 1 / float(np.mean([1 / rate for rate in rates[LEFT_OUT:]]))


def _open_clip(case: dict[str, Any], folder: Path, out: Path, steps: int) -> float:
    # It imports pandas for tables of images, which are not read here.
    pandas = types.ModuleType("pandas")
    pandas.__spec__ = importlib.machinery.ModuleSpec("pandas", None)
    sys.modules.setdefault("pandas", pandas)
    import open_clip
    import open_clip_train.data
    import open_clip_train.main

    # Its own grouping stops at an entry that webdataset 1 adds at the end of each shard.
    group = open_clip_train.data.group_by_keys_nothrow
    open_clip_train.data.group_by_keys_nothrow = lambda data, **options: group(
        (member for member in data if "fname" in member), **options
    )
    out.mkdir()
    settings = _model(case).open_clip_config(
        image_size=case["size"], context_length=case["context"]
    )
    (out / "bench.json").write_text(json.dumps(settings))
    open_clip.add_model_config(out / "bench.json")
    seconds: list[float] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if said := re.search(r"Batch \(t\): ([\d.]+)", record.getMessage()):
                seconds.append(float(said[1]))

    logging.getLogger().addHandler(Listen())
    shards = len(open_manifest(folder).shards)
    open_clip_train.main.main([
        "--model", "bench", "--train-data", f"{folder}/drawn-{{000000..{shards - 1:06d}}}.tar",
        "--train-num-samples", str(case["batch"] * steps), "--dataset-type", "webdataset",
        "--batch-size", str(case["batch"]), "--epochs", "1", "--workers", str(WORKERS),
        "--lr", "1e-4", "--warmup", "1", "--grad-clip-norm", "1.0", "--precision", "fp32",
        "--device", "cpu", "--save-frequency", "0", "--log-every-n-steps", "1",
        "--logs", str(out / "logs"), "--name", "run", "--report-to", "",
    ])  # fmt: skip
    return case["batch"] / float(np.mean(seconds[LEFT_OUT:]))


if __name__ == "__main__":
    main()
