"""Evaluation in the middle of a run, and the guard that listens to it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from tests.support import TINY_MODEL, write_dataset
from vlm.config import load_config, validate_config
from vlm.distributed import World
from vlm.errors import ConfigError
from vlm.evaluation import EvaluationConfig, evaluate
from vlm.evaluation.model import subject_of_bundle
from vlm.train import TrainConfig, train
from vlm.train.export import load_run
from vlm.train.held_out import EVALUATIONS, HeldOut, step_of_drop
from vlm.train.memory import LossMemory

GUARDED = {
    "type": "alignment",
    "weight": {"at": [0, 1], "value": [0, 1]},
    "guard": {"gap_floor": 0.001, "recall_drop": 0.05},
}


def tree(tmp_path: Path, *, kind: str = "retrieval", **changes: Any) -> dict[str, Any]:
    tasks = tmp_path / "tasks.yaml"
    data = {"type": "shards", "location": str(tmp_path / "shards")}
    tasks.write_text(
        yaml.safe_dump({"datasets": {"drawn": data}, "tasks": [{"type": kind, "data": "drawn"}]})
    )
    return {
        "name": "run", "output": str(tmp_path / "runs"), "steps": 5, "global_batch": 8,
        "image": {"size": 16}, "tokenizer": {"context_length": 8},
        "data": {"shards": str(tmp_path / "shards")},
        "model": TINY_MODEL, "loss": [{"type": "clip"}, GUARDED],
        "optim": {"type": "lion", "lr": 1e-3},
        "engine": {"type": "torch", "precision": "fp32"},
        "ema_decay": 0.9, "log_every": 1, "checkpoint_every": 100,
        "evaluation": {"tasks": str(tasks), "every": 2}, **changes,
    }  # fmt: skip


def configured(tmp_path: Path, **changes: Any) -> TrainConfig:
    return validate_config(TrainConfig, tree(tmp_path, **changes), source="test")


def run(config: TrainConfig, *, resume: bool = False) -> None:
    train(config, world=World(), console=Console(quiet=True), resume=resume)


def records(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (config.run_folder / EVALUATIONS).read_text().splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]


def test_a_run_is_evaluated_as_it_would_be_exported_and_again_if_it_was_killed_before(
    tmp_path: Path,
) -> None:
    write_dataset(tmp_path / "shards", 16)
    config = configured(tmp_path)
    run(config)
    before = records(config)
    assert [record["step"] for record in before] == [2, 4, 5]
    assert config.evaluation is not None
    tasks = load_config(EvaluationConfig, config.evaluation.tasks, [])
    found = evaluate(subject_of_bundle(load_run(config.run_folder)), tasks)
    written = json.loads((config.run_folder / "evaluation.json").read_text())
    assert written["results"] == found.model_dump(mode="json")["results"]
    recall = written["results"]["retrieval/drawn"]["image_to_text"]["recall1"]
    assert before[-1]["retrieval/drawn.image_to_text.recall1"] == recall

    # Killed after the last checkpoint was saved and before its evaluation was written whole.
    path = config.run_folder / EVALUATIONS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]) + '{"step": 5, "re')
    run(config, resume=True)
    assert records(config) == before


def test_a_drop_is_counted_from_the_best_before() -> None:
    assert step_of_drop({1: 0.5, 2: 0.46, 3: 0.6, 4: 0.56}, 0.05) is None
    assert step_of_drop({1: 0.5, 2: 0.46, 3: 0.6, 4: 0.54, 5: 0.1}, 0.05) == 4
    assert step_of_drop({}, 0.05) is None


def test_the_weight_is_held_at_what_it_was_when_recall_dropped(tmp_path: Path) -> None:
    config = configured(tmp_path)
    config.run_folder.mkdir(parents=True)
    lines = [
        {"step": 2, "retrieval/drawn.image_to_text.recall1": 0.5},
        {"step": 3, "retrieval/drawn.image_to_text.recall1": 0.3},
        {"step": 4, "retrieval/drawn.image_to_text.recall1": 0.9},
    ]
    (config.run_folder / EVALUATIONS).write_text("".join(json.dumps(x) + "\n" for x in lines))
    for step, limit in ((2, None), (3, 0.6)):
        memory = LossMemory(config.loss, np.empty(0, np.int64), World())
        held_out = HeldOut(config, memory, total_steps=5, world=World())
        (config.run_folder / EVALUATIONS).write_text("".join(json.dumps(x) + "\n" for x in lines))
        held_out.restore(step)
        kept = memory.recall(torch.arange(2)).run.get("alignment/weight_limit")
        assert (None if kept is None else pytest.approx(float(kept))) == limit
        assert [record["step"] for record in records(config)] == list(range(2, step + 1))


def test_a_guard_of_recall_needs_somebody_to_measure_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recall_drop: set evaluation\.tasks"):
        configured(tmp_path, evaluation=None)
    write_dataset(tmp_path / "shards", 16)
    with pytest.raises(ConfigError, match="no task is of type retrieval"):
        run(configured(tmp_path, kind="geometry"))
