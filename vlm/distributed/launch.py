"""torchrun with exit codes that a scheduler can act on: `python -m vlm.distributed.launch …`.

Takes torchrun's arguments and `PET_*` variables. torchrun itself ends with 1 whatever its workers
ended with, so that nobody can tell a mistake in a configuration from a preemption. This ends with

    0    when the workers ended with 0
    75   when a signal stopped them, or a worker of another node that was signalled first: start
         it again, `--resume` goes on from the checkpoint
    128 + n  when signal n killed a worker, e.g. 137 for want of memory
    the first failed worker's own code otherwise: 2 for what a person must fix, 1 for a defect

Workers get as long to save and stop as `--shutdown-timeout` says; torchrun's default is 30 s.
"""

import os
import signal
import sys
from typing import Final

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

__all__ = ["exit_code", "main"]

RESUME_ME: Final = 75
_SETTLED: Final = 2


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun; returns the exit code of this process."""
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        return exit_code(error.failures)
    except SignalException as error:
        return 128 + error.sigval if error.sigval == signal.SIGINT else RESUME_ME
    return 0


def exit_code(failures: dict[int, ProcessFailure]) -> int:
    """What the failures of local workers, by global rank, mean together.

    One worker that was told what to fix, or to resume, speaks for those that only saw it leave.
    """
    codes = [failure.exitcode for failure in failures.values()]
    for code in (_SETTLED, RESUME_ME):
        if code in codes:
            return code
    first = min(failures.values(), key=lambda failure: failure.timestamp).exitcode
    return 128 - first if first < 0 else first


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: threads of a rendezvous whose store is gone can keep an interpreter from ending, and
    # a node that does not end is not started again.
    os._exit(code)
