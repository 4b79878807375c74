"""Processes that do each job once and do not outlive who asked."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm.data.parallel import run_jobs, stop_if_asked
from vlm.errors import DataError

CODE = """
import os, sys, time
from functools import partial
from pathlib import Path
from vlm.data.parallel import run_jobs, stop_if_asked

def work(job, folder):
    Path(folder, str(os.getpid())).touch()
    while True:
        time.sleep(0.01)
        if job: stop_if_asked()

if __name__ == "__main__":
    for done in run_jobs(partial(work, folder=sys.argv[1]), [JOBS], workers=2): pass
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_once(workers: int) -> None:
    assert sorted(run_jobs(abs, range(-20, 0), workers=workers)) == list(range(1, 21))


def test_one_job_or_none_needs_no_process() -> None:
    here = list(run_jobs(_process, [None], workers=8))
    assert here == [os.getpid()]
    assert list(run_jobs(_process, [], workers=8)) == []


def _process(_: None) -> int:
    return os.getpid()


def test_an_error_of_a_job_reaches_the_caller() -> None:
    with (
        pytest.raises(ZeroDivisionError),
        contextlib.closing(run_jobs((1.0).__truediv__, [1.0, 0.0, 2.0], workers=2)) as results,
    ):
        list(results)


def test_a_worker_that_dies_is_told() -> None:
    with pytest.raises(DataError, match="a worker process died.*fewer --workers"):
        list(run_jobs(os._exit, [3, 3], workers=2))


def test_nothing_stops_outside_a_worker() -> None:
    stop_if_asked()
    assert list(run_jobs(lambda job: stop_if_asked(), [1], workers=1)) == [None]


def workers_of(tmp_path: Path, jobs: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A process with two workers that are in the middle of endless jobs."""
    script = tmp_path / "script.py"
    script.write_text(CODE.replace("JOBS", jobs))
    folder = tmp_path / "ids"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, script, folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return process, [int(path.name) for path in folder.iterdir()]


def alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_dead(process_ids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(alive(process_id) for process_id in process_ids):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.01)


def test_workers_end_when_their_parent_is_killed_even_if_their_jobs_do_not_ask(
    tmp_path: Path,
) -> None:
    process, workers = workers_of(tmp_path, "0, 0")
    assert len(workers) == 2
    process.kill()
    process.wait()
    wait_until_dead(workers)


def test_an_interrupt_ends_jobs_that_ask(tmp_path: Path) -> None:
    process, workers = workers_of(tmp_path, "1, 1")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    wait_until_dead(workers)


def test_an_interrupt_while_workers_start_prints_no_traceback_of_theirs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    # Each worker imports this as well: it tells that it does, and takes its time.
    script.write_text("""
import sys, time
from pathlib import Path
from vlm.data.parallel import run_jobs
Path(sys.argv[1], __name__).touch()
if __name__ == "__main__":
    try:
        list(run_jobs(print, [0, 0], workers=2))
    except KeyboardInterrupt:
        sys.exit(3)
else:
    time.sleep(1)
""")
    (tmp_path / "ids").mkdir()
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "ids"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ids/__mp_main__").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (3, b"")
