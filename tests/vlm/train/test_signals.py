"""In a process of their own: an interrupt that comes late would end the one that tests."""

import signal
import subprocess
import sys

from vlm.train import signals

TOLD = signals._TOLD.decode()
SCRIPT = """
import runpy, sys, time
with runpy.run_path(sys.argv[1])["stop_on_signal"](tell=True) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("asked", flush=True)
    sys.stdin.readline()
"""


def signalled(*numbers: signal.Signals) -> tuple[int, str]:
    """Exit code and last words of a process that gets signals, each once the last was taken in."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, signals.__file__],  # without torch, which takes seconds
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for number in numbers:
            assert process.stdout.readline() in ("ready\n", "asked\n")
            process.send_signal(number)
        if len(numbers) == 1:
            assert process.stdout.readline() == "asked\n"
        _, said = process.communicate("\n", timeout=60)
        return process.returncode, said


def test_the_first_ctrl_c_says_what_a_second_would_do() -> None:
    assert signalled(signal.SIGINT) == (0, TOLD)
    code, said = signalled(signal.SIGINT, signal.SIGINT)
    assert code == -signal.SIGINT
    assert said.startswith(TOLD)
    assert said.endswith("KeyboardInterrupt\n")


def test_a_scheduler_is_told_nothing() -> None:
    assert signalled(signal.SIGTERM) == (0, "")
    assert signalled(signal.SIGTERM, signal.SIGTERM) == (0, "")
