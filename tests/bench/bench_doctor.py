"""The doctor's forecast of memory against what training then takes.

    python -m tests.bench.bench_doctor [--out FILE]

Each rank is a process of its own; what it took is the most resident memory that the kernel saw, of
the largest rank where there are several. The first two cases were known when the doctor's
arithmetic was settled, the others were not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.support import write_dataset

_SMALL: dict[str, Any] = {
    "dim": 128,
    "image": {"type": "timm", "name": "resnet10t"},
    "text": {"type": "transformer", "width": 128, "layers": 2, "heads": 4},
}
_VIT: dict[str, Any] = {
    "dim": 256,
    "image": {"type": "vit", "width": 384, "layers": 6, "patch_size": 16},
    "text": {"type": "transformer", "width": 256, "layers": 4, "heads": 4},
}
_COCA: dict[str, Any] = {
    "type": "coca",
    "dim": 256,
    "image": {"type": "vit", "width": 256, "layers": 6, "head_width": 64, "patch_size": 16},
    "text": {"width": 256, "heads": 4, "unimodal_layers": 3, "multimodal_layers": 3},
    "caption_queries": 64,
    "pooler_heads": 4,
}
_CLIP = [{"type": "clip"}]
CASES: dict[str, dict[str, Any]] = {
    "resnet10t, 48 px, 256 a step, Lion, EMA": {
        "model": _SMALL, "image": {"size": 48}, "global_batch": 256, "loss": _CLIP,
        "optim": {"type": "lion"}, "ema_decay": 0.99,
    },
    "ViT 384 wide, 6 layers, 96 px, 64 a step, AdamW": {
        "model": _VIT, "image": {"size": 96}, "global_batch": 64, "loss": _CLIP,
        "optim": {"type": "adamw"},
    },
    "CoCa, 64 px, 64 a step in micro-batches of 32, Adafactor": {
        "model": _COCA, "image": {"size": 64}, "global_batch": 64, "micro_batch": 32,
        "loss": [*_CLIP, {"type": "caption", "weight": 2.0}], "optim": {"type": "adafactor"},
    },
    "SigLIP, ViT 256 wide, 8 layers, 112 px, 48 a step, Lion": {
        "model": {
            **_VIT, "image": {**_VIT["image"], "width": 256, "layers": 8},
            "init_logit_scale": 10.0, "init_logit_bias": -10.0,
        },
        "image": {"size": 112}, "global_batch": 48, "loss": [{"type": "siglip"}],
        "optim": {"type": "lion"},
    },
    "the second, 128 a step on 2 ranks": {
        "model": _VIT, "image": {"size": 96}, "global_batch": 128, "loss": _CLIP,
        "optim": {"type": "adamw"}, "ranks": 2,
    },
    "the first, FSDP, 512 a step on 2 ranks in micro-batches of 128": {
        "model": _SMALL, "image": {"size": 48}, "global_batch": 512, "micro_batch": 128,
        "loss": _CLIP, "optim": {"type": "adamw"}, "engine": {"type": "fsdp", "precision": "fp32"},
        "ranks": 2,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    out: Path | None = parser.parse_args().out
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "shards", 512, samples_per_shard=128)
        for number, (name, given) in enumerate(CASES.items()):
            case = dict(given)
            ranks = case.pop("ranks", 1)
            tree = {
                "name": "run",
                "steps": 4,
                "output": f"{folder}/runs{number}",
                "data": {"shards": f"{folder}/shards"},
                "engine": {"type": "torch", "precision": "fp32"},
                **case,
            }
            path = Path(folder) / f"case{number}.yaml"
            path.write_text(yaml.safe_dump(tree))
            forecast, measured = _forecast(path, ranks), _measured(path, ranks)
            results[name] = {
                "forecast_gib": round(forecast / 2**30, 3),
                "measured_gib": round(measured / 2**30, 3),
                "ratio": round(forecast / measured, 3),
            }
            print(name, results[name], file=sys.stderr)  # noqa: T201 - a script
    text = json.dumps(results, indent=2)
    print(text)  # noqa: T201 - a script
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


def _forecast(path: Path, ranks: int) -> float:
    command = [sys.executable, "-m", "vlm", "doctor", str(path), "--json"]
    command += ["--world-size", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (memory,) = (f for f in json.loads(_tail(done.stdout)) if f["check"] == "memory")
    return float(memory["figures"]["peak"])


def _tail(output: str) -> str:
    """The JSON document; libraries may have printed before it."""
    return output[output.index("[\n") :]


def _measured(path: Path, ranks: int) -> float:
    command = [sys.executable, "-m", "vlm", "train", str(path), "--processes", str(ranks)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        message = f"training {path} failed with {process.returncode}"
        raise SystemExit(message)
    return usage.ru_maxrss * 1024.0  # the kernel counts in KiB


if __name__ == "__main__":
    main()
