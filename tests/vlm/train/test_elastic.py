"""torchrun starts all ranks again when one has died, and the run goes on from its checkpoint."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed import run_ranks
from tests.object_stores import free_port
from tests.support import write_dataset
from tests.vlm.train.runs import (
    assert_same_weights,
    configured,
    environment,
    records,
    train_on_ranks,
    tree,
    wait_for_step,
)
from vlm.train import TrainConfig


def pid_of_rank(rank: int, launcher: int) -> int:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(children)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
def test_a_run_whose_rank_is_killed_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 64)
    straight = configured(tmp_path, name="straight", steps=24)
    broken: TrainConfig = configured(tmp_path, name="broken", steps=24)
    run_ranks(2, train_on_ranks, straight, False)

    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path, name="broken", steps=24)))
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts",
         "3", "--master-port", str(free_port()), "-m", "vlm", "train", str(path), "--resume"],
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for_step(broken, 12, torchrun)
    os.kill(pid_of_rank(0, torchrun.pid), signal.SIGKILL)
    said, _ = torchrun.communicate(timeout=200)
    assert torchrun.returncode == 0, said
    assert said.count("from scratch, 2 x cpu") == 1
    assert said.count("2 x cpu") == 2
    assert_same_weights(straight, broken)
    assert [r["loss"] for r in records(broken)] == [r["loss"] for r in records(straight)]
