"""Jobs over processes that end with their parent, whatever ends it."""

import contextlib
import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, Final, TypeVar

from vlm.errors import DataError

__all__ = ["StoppedError", "run_in_order", "run_jobs", "stop_if_asked"]

Job = TypeVar("Job")
Result = TypeVar("Result")

_JOBS_AHEAD: Final = 2

# The two slots of a worker process: what it runs, and the pipe whose end means stop.
_WORKER: Final[dict[str, Any]] = {}


class StoppedError(Exception):
    """Raised in a worker whose result nobody awaits any more."""


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int
) -> Generator[Result, None, None]:
    """`function(job)` of every job, in the order in which they are done.

    One worker means this process. When the iterator is closed, or an error or a signal ends it,
    the workers stop at their next `stop_if_asked`; use `contextlib.closing`. Interrupts are left
    to the parent, and workers whose parent was killed end at once.

    Args:
        function: Picklable; sent to each worker once, so it may carry much.
        jobs: Small, picklable.
        workers: At least 1; no more are started than there are jobs.

    Raises:
        DataError: If a worker process dies.
    """
    count = min(workers, len(jobs))
    if count <= 1:
        yield from map(function, jobs)
        return
    # Spawned, not forked: a forked child would inherit the threads' locks in any state.
    context = get_context("spawn")
    stop_reader, stop_writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start, initargs=(function, stop_reader)
    )
    try:
        rest = iter(jobs)
        with _interrupts_held():  # the first submission starts the workers
            # A window instead of all: a future for each of a million jobs would fill the memory.
            first = itertools.islice(rest, _JOBS_AHEAD * count)
            running = {pool.submit(_run, job) for job in first}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running.update(pool.submit(_run, job) for job in itertools.islice(rest, len(done)))
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        message = (
            "a worker process died, perhaps for want of memory; run the same command again with "
            "fewer --workers"
        )
        raise DataError(message) from error
    finally:
        stop_writer.close()
        pool.shutdown(wait=True, cancel_futures=True)
        stop_reader.close()


def run_in_order(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int
) -> Generator[Result, None, None]:
    """As `run_jobs`, but in the order of the jobs; what is done early waits in memory."""
    early: dict[int, Result] = {}
    numbered = functools.partial(_numbered, function)
    with contextlib.closing(run_jobs(numbered, list(enumerate(jobs)), workers=workers)) as results:
        expected = 0
        for number, result in results:
            early[number] = result
            while expected in early:
                yield early.pop(expected)
                expected += 1


def _numbered(function: Callable[[Job], Result], job: tuple[int, Job]) -> tuple[int, Result]:
    number, work = job
    return number, function(work)


def stop_if_asked() -> None:
    """Inside a long job: give up if nobody waits for its result.

    Raises:
        StoppedError: In a worker, once its parent has left `run_jobs`.
    """
    reader: Connection | None = _WORKER.get("stop")
    if reader is not None and reader.poll():
        message = "stopped by the parent process"
        raise StoppedError(message)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block ends; processes started in it never see one.

    Otherwise one that comes while they import prints a traceback from each.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(function: Callable[[Any], Any], stop: Connection) -> None:
    # Ctrl-C reaches the whole process group; torn in mid-message, the pool's queues would hang.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _WORKER.update(function=function, stop=stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(job: Any) -> Any:
    return _WORKER["function"](job)
