"""torchrun with exit codes that a scheduler can act on: `python -m vlm.distributed.launch …`.

Takes torchrun's arguments and `PET_*` variables. torchrun itself ends with 1 whatever its workers
ended with, so that nobody can tell a mistake in a configuration from a preemption. This ends with

    0    when the workers ended with 0
    75   when a signal stopped them, or the node that was signalled took the others along, or the
         node that hosts the rendezvous is gone or not there yet: start it again, `--resume` goes
         on from the checkpoint
    128 + n  when signal n killed a worker, e.g. 137 for want of memory
    the first failed worker's own code otherwise: 2 for what a person must fix, 1 for a defect

Workers get as long to save and stop as `--shutdown-timeout` says; torchrun's default is 30 s.
"""

import os
import signal
import sys
import traceback
from typing import Final, NoReturn

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

__all__ = ["deaths", "exit_code", "main"]

RESUME_ME: Final = 75
_SETTLED: Final = 2


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun; returns the exit code of this process."""
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        sys.stderr.write(deaths(error.failures))
        return exit_code(error.failures)
    except SignalException:
        return RESUME_ME
    except RendezvousError:
        # The host may leave before this node has seen its own workers end, however they did.
        traceback.print_exc()
        return RESUME_ME
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


def deaths(failures: dict[int, ProcessFailure]) -> str:
    """A line for each rank that a signal killed, which could say nothing itself."""
    lines = []
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and -failure.exitcode not in (signal.SIGTERM, signal.SIGINT):
            name = signal.Signals(-failure.exitcode).name
            why = ", often for want of memory" if name == "SIGKILL" else ""
            lines.append(
                f"rank {rank} was killed by {name}{why}; with --resume the run goes on from its "
                f"last checkpoint\n"
            )
    return "".join(lines)


def _end(code: int) -> NoReturn:
    """At once: threads of a rendezvous whose store is gone can keep an interpreter from ending.

    A node that does not end is not started again.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        _end(main())
    except SystemExit as error:  # of torchrun's arguments
        _end(error.code if isinstance(error.code, int) else _SETTLED)
    except BaseException:  # noqa: BLE001 - it is told, and the process ends with it
        traceback.print_exc()
        _end(1)
