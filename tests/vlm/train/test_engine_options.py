"""What engines offer beside the plain step, on two ranks: precisions, averages, optimizers.

All in one start of the ranks, since that is what costs time.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.distributed import run_ranks
from tests.support import write_dataset
from tests.vlm.train.runs import configured, final_weights, records, run, tree
from vlm.config import validate_config
from vlm.distributed import World, barrier
from vlm.errors import ConfigError
from vlm.train import TrainConfig, train
from vlm.train.checkpoint import Checkpoint, latest_checkpoint
from vlm.train.places import INFO, checkpoint_place

# AdamW with a large eps: like plain gradient descent, it does not turn rounding into signs.
ADAMW = {"type": "adamw", "lr": 2e-2, "eps": 1e-2, "weight_decay": 0.1}
SHORT: dict[str, Any] = {"steps": 2, "checkpoint_every": 1, "log_every": 1, "keep_checkpoints": 9,
                         "optim": ADAMW, "ema_decay": None}  # fmt: skip
DDP = {"type": "torch", "precision": "fp32"}
FSDP = {"type": "fsdp", "precision": "fp32"}
WHOLE: dict[str, dict[str, Any]] = {
    "muon": {"type": "muon", "lr": 2e-3},
    "lamb": {"type": "lamb", "lr": 1e-2},
    "adafactor": {"type": "adafactor", "lr": 1e-2},
}


def train_all(
    world: World, runs: list[dict[str, Any]], resumed: list[dict[str, Any]] | None = None
) -> None:
    """Train each; the resumed ones lose their last checkpoint then, and make it once more."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # What inductor makes of a graph takes minutes; that the model is one is what is ours.
    compile_module = torch.nn.Module.compile

    def compile_eagerly(module: torch.nn.Module, *args: Any, **options: Any) -> None:
        compile_module(module, *args, backend="eager", **options)

    torch.nn.Module.compile = compile_eagerly  # type: ignore[method-assign,assignment] # in this process
    for settings in runs:
        train(of(settings), world=world, console=Console(quiet=True), resume=True)
    for settings in resumed or []:
        if world.is_main:
            last_checkpoint(settings).folder.rename(first_end(settings))
        barrier(world)
        train(of(settings), world=world, console=Console(quiet=True), resume=True)


def first_end(settings: dict[str, Any]) -> Path:
    """Where the last checkpoint of the first of two runs is kept, for comparison."""
    return of(settings).run_folder / "first-end"


def of(settings: dict[str, Any]) -> TrainConfig:
    return validate_config(TrainConfig, settings, source="test")


def losses(settings: dict[str, Any]) -> list[float]:
    return [record["loss"] for record in records(of(settings))]


def last_checkpoint(settings: dict[str, Any]) -> Checkpoint:
    checkpoint = latest_checkpoint(checkpoint_place(of(settings)))
    assert checkpoint is not None
    return checkpoint


@pytest.mark.slow
@pytest.mark.distributed
def test_options_train_on_two_ranks_what_they_train_on_one(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 64)

    def settings(name: str, engine: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return tree(tmp_path, **{**SHORT, "name": name, "engine": engine, **changes})

    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(
        f"datasets: {{drawn: {{type: shards, location: {tmp_path / 'shards'}}}}}\n"
        "tasks: [{type: retrieval, data: drawn}]\n"
    )
    one = settings("one", DDP, ema_decay=0.9)
    alone = {name: settings(f"{name}-1", DDP, optim=optim) for name, optim in WHOLE.items()}
    for each in (one, *alone.values()):
        run(of(each))

    averaged = settings("averaged", FSDP, ema_decay=0.9)
    offloaded = settings("offloaded", {**FSDP, "offload": True})
    compiled = settings("compiled", {**DDP, "compile": True})
    judged = settings("judged", DDP, evaluation={"tasks": str(tasks), "every": 2})
    whole = {name: settings(f"{name}-2", FSDP, optim=optim) for name, optim in WHOLE.items()}
    half = {"type": "torch", "precision": "fp16"}
    scaled = settings("scaled", half)
    narrow = settings("narrow", {**FSDP, "precision": "bf16"})
    resumed = [*whole.values(), scaled]
    run_ranks(2, train_all, [averaged, offloaded, compiled, judged, *resumed, narrow], resumed)

    for each in (averaged, offloaded, judged, compiled):
        assert losses(each) == pytest.approx(losses(one), rel=1e-5), each["name"]
    means = final_weights(of(one), "ema")
    for name, mean in final_weights(of(averaged), "ema").items():
        assert torch.allclose(mean, means[name], atol=1e-5), name
    assert (of(judged).run_folder / "evaluation.json").is_file()

    # They look at whole matrices, of which each rank has some rows.
    for name, each in whole.items():
        assert losses(each) == pytest.approx(losses(alone[name]), rel=5e-4), name
    # What it keeps of rows and columns is the same on all ranks, and is written once.
    kept = last_checkpoint(whole["adafactor"]).state().optimizer
    assert all(kept.whole(key).numel() for key in kept.shapes)

    assert losses(narrow) == pytest.approx(losses(one), rel=0.05)
    assert losses(narrow) != pytest.approx(losses(one), rel=1e-5)
    scale = last_checkpoint(scaled).numbers["loss scaler/scale"]
    assert scale < 2**16  # gradients overflowed, and a step was skipped

    # What each keeps of matrices, and the scale, is in the checkpoints: the same bytes again.
    for each in resumed:
        first, again = first_end(each), last_checkpoint(each)
        files = {path.name: path.read_bytes() for path in first.glob("*.safetensors")}
        assert len(files) == 4, sorted(files)  # of weights and optimizer, of two ranks
        found = {name: (again.folder / name).read_bytes() for name in files}
        assert [name for name in files if found[name] != files[name]] == [], each["name"]
        assert again.numbers == json.loads((first / INFO).read_text())["numbers"], each["name"]


def test_what_a_device_cannot_compute_is_refused_before_the_first_step(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 16)
    config = configured(tmp_path, engine={"type": "torch", "precision": "fp8"})
    with pytest.raises(ConfigError, match="fp8 needs a CUDA device .* found a cpu; take bf16"):
        run(config)
    with pytest.raises(ConfigError, match="optim.type=muon looks at whole matrices, which DeepSp"):
        configured(tmp_path, engine={"type": "deepspeed"}, optim=WHOLE["muon"])
