"""Real processes take places of their own, and one that was killed leaves its place."""

import subprocess
import sys
from pathlib import Path

from serving.settings import ServingSettings

CODE = (
    "import sys; from pathlib import Path; from serving.places import claim_place; "
    "print(claim_place(Path(sys.argv[1]), 3), flush=True); sys.stdin.read()"
)


def claimant(folder: Path) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", CODE, str(folder)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def place(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_each_living_process_has_a_place_and_the_killed_ones_is_taken_again(tmp_path: Path) -> None:
    processes = [claimant(tmp_path) for _ in range(3)]
    try:
        places = [place(process) for process in processes]
        assert sorted(places) == [0, 1, 2]
        late = claimant(tmp_path)  # waits: all places are held
        processes.append(late)
        killed = processes[1]
        killed.kill()
        killed.wait()
        assert place(late) == places[1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_place_decides_the_device() -> None:
    settings = ServingSettings(devices=["cuda:0", "cuda:1"], workers=2)
    assert settings.processes == 4
    assert [settings.on_device(n).device for n in range(4)] == ["cuda:0", "cuda:1"] * 2
    alone = ServingSettings(device="cuda:3", workers=2)
    assert (alone.processes, alone.on_device(1).device) == (2, "cuda:3")
