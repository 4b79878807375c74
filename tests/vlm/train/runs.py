"""Small runs for the tests of training: how they are configured, started and compared."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from tests.support import TINY_MODEL
from vlm.config import validate_config
from vlm.distributed import World
from vlm.train import TrainConfig, train
from vlm.train.checkpoint import latest_checkpoint, load_weights
from vlm.train.places import checkpoint_place

REMEMBERING: list[dict[str, Any]] = [
    {"type": "fastclip_v3", "gamma": 0.3},
    {"type": "isogclr", "weight": 0.2, "init_temperature": 0.1},
    {"type": "alignment", "weight": {"at": [0, 1], "value": [0, 1]}, "guard": {"gap_floor": 1.0}},
]


def tree(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "run",
        "output": str(tmp_path / "runs"),
        "steps": 12,
        "global_batch": 12,
        "image": {"size": 32},
        "tokenizer": {"context_length": 12},
        "data": {
            "shards": str(tmp_path / "shards"),
            "stream": {"group_field": "concept", "captions": {"text": 0.5, "tags": 0.5}},
            "augment": {"margin": 1.25, "min_scale": 0.8, "rotation_degrees": 10, "contrast": 0.2},
        },
        "model": TINY_MODEL,
        "loss": [{"type": "clip"}, {"type": "alignment", "weight": 0.1},
                 {"type": "uniformity", "weight": 0.1}],
        "optim": {"type": "lion", "lr": 2e-3, "weight_decay": 0.1},
        "engine": {"type": "torch", "precision": "fp32"},
        "ema_decay": 0.9,
        "log_every": 2,
        "checkpoint_every": 5,
    }  # fmt: skip
    return {**base, **changes}


def configured(tmp_path: Path, **changes: Any) -> TrainConfig:
    return validate_config(TrainConfig, tree(tmp_path, **changes), source="test")


def quiet() -> Console:
    return Console(quiet=True)


def run(config: TrainConfig, *, resume: bool = False) -> int:
    return train(config, world=World(), console=quiet(), resume=resume).step


def final_weights(config: TrainConfig, name: str = "model") -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(checkpoint_place(config))
    assert checkpoint is not None
    weights = load_weights(checkpoint, ema=name == "ema")
    assert weights is not None
    return weights


def records(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_weights(a: TrainConfig, b: TrainConfig) -> None:
    for name in ("model", "ema"):
        first, second = final_weights(a, name), final_weights(b, name)
        assert first.keys() == second.keys()
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different


def forget_after(config: TrainConfig, step: int) -> None:
    """As if the machine had died before the next checkpoint."""
    for folder in (config.run_folder / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def command(tmp_path: Path, name: str, **changes: Any) -> list[str]:
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path, name=name, steps=60, **changes)))
    return [sys.executable, "-m", "vlm", "train", str(path), "--resume"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_for_step(config: TrainConfig, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = config.run_folder / "metrics.jsonl"
        if path.is_file() and path.read_text().count("\n") * 2 >= step:
            return
        time.sleep(0.02)


def train_on_ranks(world: World, config: TrainConfig, resume: bool) -> int:
    return train(config, world=world, console=quiet(), resume=resume).step
