"""A run that goes wrong returns to its last checkpoint, and leaves out what led there."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.support import write_dataset
from tests.vlm.train.runs import (
    assert_same_weights,
    configured,
    quiet,
    records,
    run,
)
from vlm.distributed import World, barrier, watch_ranks
from vlm.errors import CheckpointError, VlmError
from vlm.train import TrainConfig, train
from vlm.train.config import RecoveryConfig
from vlm.train.faults import FaultWatch, SkippedWindow, SkippedWindows
from vlm.train.step import train_step
from vlm.types import LossOutput

NAN = float("nan")


@pytest.fixture(autouse=True)
def _dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 64)


def test_a_leap_of_the_gradient_is_a_fault_only_where_asked_and_known() -> None:
    usual = [1.0, 1.2, 0.9, 1.1] * 6
    watch = FaultWatch(RecoveryConfig(spike_factor=5), overflows=False)
    assert [watch.fault(2.0, norm) for norm in [50.0, *usual]] == [None] * 25
    assert watch.fault(2.0, 30.0) == "the gradient's norm leapt from 1.1 to 30"
    assert watch.fault(2.0, 5.0) is None
    assert watch.fault(NAN, 1.0) == "the loss is nan"
    assert watch.fault(2.0, NAN) == "the gradient's norm is nan"
    assert FaultWatch(RecoveryConfig(), overflows=True).fault(2.0, float("inf")) is None


def test_windows_are_kept_in_a_file_with_a_budget(tmp_path: Path) -> None:
    config = RecoveryConfig(max_rollbacks=2, skip_steps=3)
    windows = SkippedWindows(tmp_path / "w.jsonl", config, precision="bf16")
    windows.add(7, "the loss is nan", write=True)
    again = SkippedWindows(tmp_path / "w.jsonl", config, precision="bf16")
    assert [step for step in range(12) if again.cover(step)] == [5, 6, 7]
    assert again.add(1, "x", write=True) == SkippedWindow(first_step=0, last_step=1, reason="x")
    with pytest.raises(VlmError, match="step 10, .* rolled back 2 times.*engine.precision=fp32"):
        again.add(9, "the loss is nan", write=True)
    (tmp_path / "w.jsonl").write_text("{torn")
    with pytest.raises(CheckpointError, match=r"w.jsonl: damaged"):
        SkippedWindows(tmp_path / "w.jsonl", config, precision="bf16")


class Poison:
    """As if the batch of one step were bad: it ruins the weights, then the loss."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.met = 0

    def __call__(self, *args: Any, step: int, **more: Any) -> tuple[LossOutput, float]:
        loss, norm = train_step(*args, step=step, **more)
        if step == self.step:
            self.met += 1
            for parameter in args[1].model.parameters():
                parameter.data.fill_(NAN)
            loss = LossOutput(total=loss.total * NAN, statistics=loss.statistics)
        return loss, norm


def poisoned(world: World, config: TrainConfig, step: int) -> int:
    poison = Poison(step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm.train.loop.train_step", poison)
        train(config, world=world, console=quiet(), resume=False)
    return poison.met


def test_a_poisoned_step_is_left_out_and_a_resumed_run_leaves_out_the_same(tmp_path: Path) -> None:
    config = configured(tmp_path, checkpoint_every=4, log_every=1, keep_checkpoints=9)
    assert poisoned(World(), config, 6) == 1
    line = json.loads((config.run_folder / "skipped_windows.jsonl").read_text())
    assert line == {"first_step": 6, "last_step": 6, "reason": "the loss is nan"}
    assert [r["step"] for r in records(config)] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert all(r["loss"] < 5 for r in records(config))
    # The same run, without the fault but with the record of it, ends with the same weights.
    other = configured(tmp_path, name="other", checkpoint_every=4, log_every=1)
    other.run_folder.mkdir()
    record = config.run_folder / "skipped_windows.jsonl"
    (other.run_folder / record.name).write_text(record.read_text())
    run(other, resume=True)
    assert_same_weights(config, other)


def test_faults_without_a_checkpoint_or_a_budget_end_the_run(tmp_path: Path) -> None:
    early = configured(tmp_path, name="early", checkpoint_every=5)
    with pytest.raises(VlmError, match="nan at step 3, and there is no checkpoint.*Lower optim.lr"):
        poisoned(World(), early, 2)
    never = configured(tmp_path, name="never", checkpoint_every=2, recovery={"max_rollbacks": 0})
    with pytest.raises(VlmError, match="nan at step 8, .* rolled back 0 times") as told:
        poisoned(World(), never, 7)
    # What the first left out is not left out by another that begins anew under its name.
    assert (early.run_folder / "skipped_windows.jsonl").is_file()
    run(early)
    assert not (early.run_folder / "skipped_windows.jsonl").exists()
    assert never.engine.precision == "fp32"
    assert "lr or lengthen the warm-up, then" in str(told.value)  # not: "use fp32", as it once said


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_go_back_together(tmp_path: Path) -> None:
    one = configured(tmp_path, name="one", checkpoint_every=4, log_every=1, steps=8)
    two = configured(tmp_path, name="two", checkpoint_every=4, log_every=1, steps=8)
    poisoned(World(), one, 5)
    assert run_ranks(2, poisoned, two, 5) == [1, 1]
    assert [r["loss"] for r in records(two)] == pytest.approx(
        [r["loss"] for r in records(one)], rel=1e-4
    )


def wait_for_rank_1(world: World) -> list[str]:
    said: list[str] = []
    with watch_ranks(world, after_seconds=0.2, say=said.append) as heartbeat:
        heartbeat.beat(7, "waiting for data")
        if world.rank == 1:
            time.sleep(2)
        heartbeat.beat(7, "computing")
        barrier(world)
    return said


@pytest.mark.distributed
def test_the_rank_that_keeps_others_waiting_is_named() -> None:
    said, *others = run_ranks(3, wait_for_rank_1)
    assert others == [[], []]
    assert len(said) == 1
    assert re.fullmatch(
        r"no progress for 0.2 s: rank 1 on \S+, waiting for data at step 7", said[0]
    )
