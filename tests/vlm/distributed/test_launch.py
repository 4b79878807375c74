"""A scheduler sees from the exit code of a node what became of its ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from typer.testing import CliRunner

from tests.vlm.train.runs import tree
from vlm.cli.main import app
from vlm.cli.train import RESUME_ME
from vlm.distributed import launch, ranks_to_start

WORKER = """
import os, signal, sys, time
from pathlib import Path
if sys.argv[1] == "wait":
    def stop(number, frame):
        time.sleep(0.5)  # the checkpoint
        Path(f"saved-{os.environ['RANK']}").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    Path(f"up-{os.environ['RANK']}").touch()
    time.sleep(120)
sys.exit(int(sys.argv[1]))
"""


def failure(code: int, timestamp: int = 0) -> ProcessFailure:
    found = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="<N/A>")
    found.timestamp = timestamp
    return found


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([75, 75], 75),
        ([1, 2], 2),
        ([1, 75], 75),
        ([-signal.SIGKILL, 1], 128 + signal.SIGKILL),
        ([3], 3),
    ],
)
def test_what_workers_ended_with_decides_what_the_node_ends_with(
    codes: list[int], expected: int
) -> None:
    failures = {rank: failure(code, timestamp=rank) for rank, code in enumerate(codes)}
    assert launch.exit_code(failures) == expected


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SignalException("stopped", signal.SIGTERM), 75),
        (SignalException("stopped", signal.SIGINT), 75),
        (RendezvousConnectionError("the host is gone"), 75),
    ],
)
def test_a_node_that_others_ended_is_resumed_too(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(arguments: object) -> None:
        raise error

    monkeypatch.setattr("torch.distributed.run.run", run)
    assert launch.main(["worker.py"]) == code


def test_a_killed_rank_is_named_for_it_cannot_say_so_itself() -> None:
    found = launch.deaths({0: failure(1), 1: failure(-signal.SIGKILL), 2: failure(-signal.SIGTERM),
                           3: failure(-signal.SIGSEGV)})  # fmt: skip
    first, second = found.splitlines()
    assert first.startswith("rank 1 was killed by SIGKILL, often for want of memory; with --resume")
    assert second.startswith("rank 3 was killed by SIGSEGV; with --resume")


def test_the_code_that_means_resume_is_the_trainers() -> None:
    assert launch.RESUME_ME == RESUME_ME


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "worker.py").write_text(WORKER)
    return [sys.executable, "-m", "vlm.distributed.launch", "--standalone", "--nproc-per-node=2"]


@pytest.mark.distributed
def test_a_mistake_of_the_user_is_told_apart(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run([*command, "worker.py", "2"], cwd=tmp_path, env=environment())
    assert done.returncode == 2


@pytest.mark.distributed
def test_a_signalled_node_lets_its_ranks_save_and_asks_to_be_resumed(
    command: list[str], tmp_path: Path
) -> None:
    process = subprocess.Popen([*command, "worker.py", "wait"], cwd=tmp_path, env=environment())
    try:
        while not all((tmp_path / f"up-{rank}").exists() for rank in (0, 1)):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == RESUME_ME
    finally:
        process.kill()
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[3])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def test_training_alone_starts_a_rank_for_each_device_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def replace_process(path: str, arguments: list[str]) -> None:
        started.append(arguments[1:])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", replace_process)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path)))
    CliRunner().invoke(app, ["train", str(path), "seed=1", "--resume"])
    CliRunner().invoke(app, ["train", str(path), "--processes", "2"])
    launch = "-m vlm.distributed.launch --standalone --nproc-per-node"
    assert [" ".join(each) for each in started] == [
        f"{launch} 4 -m vlm train {path} seed=1 --resume --of 4",
        f"{launch} 2 -m vlm train {path} --of 2",
    ]  # fmt: skip
    assert ranks_to_start(1) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks_to_start(8) == ranks_to_start(None) == 1
