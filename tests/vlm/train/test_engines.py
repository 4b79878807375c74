"""Every engine, on any number of ranks and micro-batches, trains what one process trains.

Runs are short and many, so they share process groups: starting those is what costs time.
"""

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.distributed import run_ranks
from tests.support import write_dataset
from tests.vlm.train.runs import configured, records, run, tree
from vlm.config import validate_config
from vlm.distributed import World
from vlm.errors import ConfigError
from vlm.train import TrainConfig

# AdamW with a large eps: like plain gradient descent, it does not turn rounding into signs.
OPTIM = {"type": "adamw", "lr": 2e-2, "eps": 1e-2, "weight_decay": 0.1}
COMMON: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "log_every": 1, "keep_checkpoints": 9,
                          "optim": OPTIM, "ema_decay": None}  # fmt: skip
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"type": "torch", "precision": "fp32"},
    "fsdp": {"type": "fsdp", "precision": "fp32"},
    **{
        f"zero{stage}": {"type": "deepspeed", "zero_stage": stage, "precision": "fp32",
                         "persistence_threshold": 0}
        for stage in range(4)
    },
}  # fmt: skip


def train_all(world: World, trees: list[dict[str, Any]], resume: bool) -> None:
    warnings.simplefilter("ignore")  # DeepSpeed's own, which a user sees as well
    logging.disable(logging.WARNING)
    from vlm.train import train

    for settings in trees:
        config = validate_config(TrainConfig, settings, source="test")
        train(config, world=world, console=Console(quiet=True), resume=resume)


def losses(settings: dict[str, Any]) -> list[float]:
    return [r["loss"] for r in records(validate_config(TrainConfig, settings, source="test"))]


@pytest.mark.slow
@pytest.mark.distributed
def test_every_engine_trains_the_same_and_goes_on_where_another_stopped(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    write_dataset(tmp_path / "shards", 64)
    one = configured(tmp_path, name="one", **COMMON)
    run(one)
    expected = [record["loss"] for record in records(one)]
    assert expected[-1] < 0.95 * expected[0]

    def settings(name: str, engine: str, **changes: Any) -> dict[str, Any]:
        return tree(tmp_path, name=name, engine=ENGINES[engine], **COMMON, **changes)

    def half_of(name: str, source: str) -> None:
        """A run that stopped at step 2, as another left it."""
        checkpoints = tmp_path / "runs" / name / "checkpoints"
        shutil.copytree(
            tmp_path / "runs" / source / "checkpoints/step-00000002",
            checkpoints / "step-00000002",
        )

    two = [settings(f"{name}-2", name, micro_batch=2) for name in ENGINES]
    run_ranks(2, train_all, two, False)
    for trained in two:
        assert losses(trained) == pytest.approx(expected, rel=1e-5), trained["name"]

    # Each engine continues what the next one, on two ranks in micro-batches, has begun.
    for size, names in ((1, ["fsdp", "zero3"]), (3, list(ENGINES))):
        mixed = []
        for name in names:
            before = list(ENGINES)[list(ENGINES).index(name) - 1]
            mixed.append(settings(f"{name}-{size}", name))
            half_of(mixed[-1]["name"], f"{before}-2")
        run_ranks(size, train_all, mixed, True)
        for trained in mixed:
            assert losses(trained) == pytest.approx(expected[2:], rel=1e-5), trained["name"]


def test_what_an_engine_cannot_do_is_said_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zero_stage=0 neither offloads nor computes in fp16"):
        configured(tmp_path, engine={"type": "deepspeed", "zero_stage": 0, "precision": "fp16"})
    with pytest.raises(ConfigError, match="ema_decay: .* engine.type=fsdp"):
        configured(tmp_path, engine={"type": "deepspeed", "zero_stage": 3})
