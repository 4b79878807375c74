"""A run that was stopped or killed goes on as if nothing had been."""

import random
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.support import tiny_bundle, write_dataset
from tests.vlm.train.runs import (
    REMEMBERING,
    assert_same_weights,
    command,
    configured,
    environment,
    forget_after,
    records,
    run,
    train_on_ranks,
    tree,
    wait_for_step,
)
from vlm.errors import CheckpointError
from vlm.train import TrainConfig
from vlm.train.checkpoint import latest_checkpoint
from vlm.train.places import checkpoint_place


@pytest.fixture(autouse=True)
def _dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 64)


def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(tmp_path: Path) -> None:
    straight = configured(tmp_path, name="straight")
    run(straight)
    broken = configured(tmp_path, name="broken", keep_checkpoints=9)
    run(broken)
    forget_after(broken, 5)
    (broken.run_folder / "checkpoints" / ".draft-00000010").mkdir()
    assert run(broken, resume=True) == 12
    assert_same_weights(straight, broken)
    drop = ("samples_per_second", "data_wait_fraction", "goodput", "mfu")
    kept = [[{k: v for k, v in r.items() if k not in drop} for r in records(c)]
            for c in (straight, broken)]  # fmt: skip
    assert kept[0] == kept[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of 60 steps that nobody stopped."""
    folder = tmp_path_factory.mktemp("straight")
    write_dataset(folder / "shards", 64)
    subprocess.run(command(folder, "straight"), check=True, env=environment(), capture_output=True)
    return configured(folder, name="straight", steps=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_process_resumes_to_the_same_weights(
    tmp_path: Path, straight: TrainConfig, number: signal.Signals
) -> None:
    broken = configured(tmp_path, name="broken", steps=60)
    process = subprocess.Popen(
        [*command(tmp_path, "broken"), "log_every=2"], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_step(broken, random.Random(number).randrange(6, 40), process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 75, errors
        assert "checkpoint saved" in output
        told = output.split("continue with: ")[1].split("\n")[0]
        path = str(tmp_path / "broken.yaml")
        assert shlex.split(told) == ["vlm", "train", path, "log_every=2", "--resume"]
    assert not list(broken.run_folder.rglob(".*draft*")) or number == signal.SIGKILL
    done = subprocess.run(
        command(tmp_path, "broken"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same_weights(straight, broken)


def test_a_run_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    run(configured(tmp_path))
    with pytest.raises(CheckpointError, match="has checkpoints up to step 12. Continue it with"):
        run(configured(tmp_path))


def test_a_checkpoint_of_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    run(configured(tmp_path))
    changed = configured(tmp_path, seed=4, optim={"type": "lion", "lr": 1e-4})
    with pytest.raises(CheckpointError, match="these differ: seed, optim"):
        run(changed, resume=True)


def test_other_data_are_refused(tmp_path: Path) -> None:
    run(configured(tmp_path))
    write_dataset(tmp_path / "other", 65)
    data = {**tree(tmp_path)["data"], "shards": str(tmp_path / "other")}
    with pytest.raises(CheckpointError, match="these differ: sources, data_fingerprint"):
        run(configured(tmp_path, data=data), resume=True)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run(config)
    before = (config.run_folder / "metrics.jsonl").read_bytes()
    assert run(config, resume=True) == 12
    assert (config.run_folder / "metrics.jsonl").read_bytes() == before


def final_memory(config: TrainConfig) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(checkpoint_place(config))
    assert checkpoint is not None
    return load_file(checkpoint.folder / "memory-00000.safetensors")


def test_a_loss_that_remembers_resumes_to_the_same_weights_and_memory(tmp_path: Path) -> None:
    straight = configured(tmp_path, name="straight", loss=REMEMBERING)
    broken = configured(tmp_path, name="broken", loss=REMEMBERING, keep_checkpoints=9)
    run(straight)
    run(broken)
    forget_after(broken, 5)
    assert run(broken, resume=True) == 12
    assert_same_weights(straight, broken)
    first, second = final_memory(straight), final_memory(broken)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    seen = first["fastclip_v3/log_image"].isfinite()
    assert len(seen) == 64
    assert int(seen.sum()) > 32
    assert not torch.equal(first["isogclr/temperature_text"], torch.full((64,), 0.1))


def test_a_loss_that_remembers_more_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    run(configured(tmp_path))
    with pytest.raises(CheckpointError, match="remembers nothing of sogclr/log_image"):
        run(configured(tmp_path, loss=[{"type": "sogclr"}]), resume=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_remember_what_one_process_does(tmp_path: Path) -> None:
    optim = {"type": "lion", "lr": 1e-3, "weight_decay": 0.1}
    one = configured(tmp_path, name="one", loss=REMEMBERING, optim=optim)
    two = configured(tmp_path, name="two", loss=REMEMBERING, optim=optim, keep_checkpoints=9)
    run(one)
    assert run_ranks(2, train_on_ranks, two, False) == [12, 12]
    assert [r["loss"] for r in records(two)] == pytest.approx(
        [r["loss"] for r in records(one)], rel=2e-5
    )
    forget_after(two, 5)
    run(two, resume=True)  # on one process, from the parts of both
    assert [r["loss"] for r in records(two)] == pytest.approx(
        [r["loss"] for r in records(one)], rel=2e-5
    )


def test_a_run_follows_a_teacher_and_resumes_with_no_other(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "teacher", seed=1)
    tiny_bundle(tmp_path / "another", seed=2)
    loss: list[dict[str, Any]] = [
        {"type": "distillation"}, {"type": "soft_clip", "weight": 0.5},
        {"type": "clip", "weight": 0.1, "false_negatives": {"cosine": 0.9}},
    ]  # fmt: skip
    config = configured(tmp_path, loss=loss, teacher={"bundle": str(tmp_path / "teacher")})
    run(config)
    found = records(config)
    assert found[-1]["distillation"] < found[0]["distillation"]
    assert 0 <= found[-1]["clip/masked_fraction"] <= 1
    changed = configured(tmp_path, loss=loss, teacher={"bundle": str(tmp_path / "another")})
    with pytest.raises(CheckpointError, match="these differ: teacher"):
        run(changed, resume=True)
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    moved = configured(tmp_path, loss=loss, teacher={"bundle": str(tmp_path / "moved")})
    assert run(moved, resume=True) == 12


@pytest.mark.slow
def test_a_killed_process_that_remembers_resumes_to_the_same_memory(tmp_path: Path) -> None:
    straight, broken = (
        configured(tmp_path, name=name, steps=60, loss=REMEMBERING)
        for name in ("straight", "broken")
    )
    # As the other: with more threads, sums are added up in another order.
    subprocess.run(command(tmp_path, "straight", loss=REMEMBERING), check=True, env=environment(),
                   capture_output=True)  # fmt: skip
    process = subprocess.Popen(
        command(tmp_path, "broken", loss=REMEMBERING), env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_step(broken, 17, process)
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -9
    again = command(tmp_path, "broken", loss=REMEMBERING)
    subprocess.run(again, check=True, env=environment(), capture_output=True)
    assert_same_weights(straight, broken)
    first, second = final_memory(straight), final_memory(broken)
    assert all(torch.equal(first[name], second[name]) for name in first)
