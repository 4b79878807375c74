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


def train_all(world: World, begun: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    warnings.simplefilter("ignore")  # DeepSpeed's own, which a user sees as well
    logging.disable(logging.WARNING)
    from vlm.train import train

    for settings in [*begun, *resumed]:
        config = validate_config(TrainConfig, settings, source="test")
        train(config, world=world, console=Console(quiet=True), resume=settings in resumed)


def losses(settings: dict[str, Any]) -> list[float]:
    return [r["loss"] for r in records(validate_config(TrainConfig, settings, source="test"))]


def accumulated(is_wanted: bool) -> dict[str, Any]:
    """Settings of a global batch in several micro-batches, or in one."""
    return {"micro_batch": 2} if is_wanted else {}


def assert_losses(runs: list[dict[str, Any]], expected: list[float]) -> None:
    for trained in runs:
        assert losses(trained) == pytest.approx(expected, rel=1e-5), trained["name"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
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

    # In micro-batches on two ranks and three, in whole shares on one. And each engine goes on with
    # what the one before it began on other ranks, whole where that was in micro-batches.
    for size, before in ((1, None), (2, 1), (3, 2), (1, 3)):
        begun, resumed = [], []
        for other, name in zip([*list(ENGINES)[-1:], *ENGINES], ENGINES, strict=False):
            if before != 3:
                begun.append(settings(f"{name}-{size}", name, **accumulated(size > 1)))
            if before is not None:
                again = settings(f"{name}-{before}-{size}", name, **accumulated(before == 1))
                half_of(again["name"], f"{other}-{before}")
                resumed.append(again)
        run_ranks(size, train_all, begun, resumed)
        assert_losses(begun, expected)
        assert_losses(resumed, expected[2:])


def test_what_an_engine_cannot_do_is_said_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zero_stage=0 neither offloads nor computes in fp16"):
        configured(tmp_path, engine={"type": "deepspeed", "zero_stage": 0, "precision": "fp16"})
    with pytest.raises(ConfigError, match="ema_decay: .* engine.type=fsdp"):
        configured(tmp_path, engine={"type": "deepspeed", "zero_stage": 3})
