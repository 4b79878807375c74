"""Checkpoints are whole or not there, whatever happens to the disk."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.support import write_dataset
from tests.vlm.train.runs import (
    assert_same_weights,
    configured,
    final_weights,
    records,
    run,
    tree,
)
from vlm.distributed import World
from vlm.errors import CheckpointError, DataError
from vlm.train import train
from vlm.train.checkpoint import latest_checkpoint
from vlm.train.places import checkpoint_place
from vlm.train.step import train_step
from vlm.types import LossOutput


@pytest.fixture(autouse=True)
def _dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 64)


@pytest.mark.parametrize("name", ["model-00000.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_left_aside_for_the_one_before(tmp_path: Path, name: str) -> None:
    config = configured(tmp_path, checkpoint_every=4, keep_checkpoints=3)
    run(config)
    expected = final_weights(config)
    folder = config.run_folder / "checkpoints"
    torn = folder / "step-00000012" / name
    torn.write_bytes(torn.read_bytes()[:-9])
    heard = io.StringIO()
    train(config, world=World(), console=Console(file=heard, width=500), resume=True)
    said = heard.getvalue()
    assert re.search(r"left aside, .*step-00000012/checkpoint.json: damaged \(", said)
    assert name in said
    assert "from step 8" in said
    assert (folder / "damaged-00000012").is_dir()
    found = final_weights(config)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for path in folder.glob(f"*/{name}"):
        path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=f"no checkpoint can be used.*{name}"):
        run(config, resume=True)


def test_a_checkpoint_holds_tensors_and_text_alone(tmp_path: Path) -> None:
    config = configured(tmp_path, steps=1)
    run(config)
    checkpoint = latest_checkpoint(checkpoint_place(config))
    assert checkpoint is not None
    names = sorted(path.name for path in checkpoint.folder.iterdir())
    assert names == ["checkpoint.json", "ema-00000.safetensors", "model-00000.safetensors",
                     "optimizer-00000.safetensors"]  # fmt: skip


def test_a_full_disk_costs_no_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, steps=5)
    run(config)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm.train.shards.save_file", full)
    other = configured(tmp_path, name="other")
    with pytest.raises(CheckpointError, match="No space left on device.*free some space"):
        run(other)
    assert list((other.run_folder / "checkpoints").iterdir()) == []
    page = (other.run_folder / "report.html").read_text()
    assert "<p>failed: step" in page  # it said "finished"
    # It is told at the next step, not when the next checkpoint is due.
    long = configured(tmp_path, name="long", steps=400, checkpoint_every=100, log_every=1)
    with pytest.raises(CheckpointError, match="step-00000100: the checkpoint could not be saved"):
        run(long)
    assert records(long)[-1]["step"] < 200
    assert latest_checkpoint(checkpoint_place(config)) is not None


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    config = configured(tmp_path, checkpoint_every=3, keep_checkpoints=2)
    run(config)
    folders = sorted(p.name for p in (config.run_folder / "checkpoints").iterdir())
    assert folders == ["step-00000009", "step-00000012"]


def test_a_folder_that_cannot_be_written_is_an_error_with_advice(tmp_path: Path) -> None:
    # A file in the folder's place stops even root.
    config = configured(tmp_path)
    config.output.mkdir()
    config.run_folder.write_text("mine")
    with pytest.raises(CheckpointError, match=r"run: cannot be written \(File exists\).*`output`"):
        run(config)
    assert config.run_folder.read_text() == "mine"
    below = configured(tmp_path, output=str(config.run_folder / "deeper"))
    with pytest.raises(CheckpointError, match=r"cannot be written \(Not a directory\)"):
        run(below)


class Hook:
    """Does something to the disk before one step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def __call__(self, *args: Any, step: int, **more: Any) -> tuple[LossOutput, float]:
        if step == self.step:
            self.action()
        return train_step(*args, step=step, **more)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_a_folder_that_becomes_unwritable_costs_only_the_steps_since_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    straight = configured(tmp_path, name="straight")
    run(straight)
    config = configured(tmp_path)
    path, aside = config.run_folder / name, tmp_path / "aside"

    def spoil() -> None:
        latest_checkpoint(checkpoint_place(config))  # that of step 5 is whole
        path.rename(aside)
        if aside.is_dir():
            path.write_text("in its place")
        else:
            path.mkdir()

    monkeypatch.setattr("vlm.train.loop.train_step", Hook(7, spoil))
    with pytest.raises(CheckpointError, match=r"(cannot be written|could not be saved).*`output`"):
        run(config)
    monkeypatch.undo()
    path.unlink() if aside.is_dir() else path.rmdir()
    aside.rename(path)
    assert run(config, resume=True) == 12
    assert_same_weights(straight, config)


def test_a_shard_that_vanishes_is_named_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tree(tmp_path)["data"]
    data["stream"]["cache_bytes"] = 0
    straight = configured(tmp_path, name="straight", data=data)
    run(straight)
    shard = tmp_path / "shards" / "drawn-000003.tar"
    # A file that is open stays readable, so this run keeps one open alone.
    monkeypatch.setattr("vlm.data.shards._MAX_OPEN_SHARDS", 1)
    monkeypatch.setattr(
        "vlm.train.loop.train_step", Hook(5, lambda: shard.rename(tmp_path / "away"))
    )
    config = configured(tmp_path, data=data)
    with pytest.raises(DataError, match=r"drawn-000003.tar: cannot be read \(No such file"):
        run(config)
    monkeypatch.undo()
    (tmp_path / "away").rename(shard)
    assert run(config, resume=True) == 12
    assert_same_weights(straight, config)
