"""How the CPU's worker threads wait for each other.

By default OpenMP's threads spin while they wait, which is fastest on an idle machine and ruinous on
a busy one: with two threads on two cores and another busy process, the losses of one step took 250
to 1,400 ms spinning and 9 to 29 ms sleeping. A person's machine is busy, so threads sleep unless
`OMP_WAIT_POLICY` says otherwise.
"""

import os

__all__ = ["let_idle_threads_sleep"]


def let_idle_threads_sleep() -> None:
    """Set the policy for this process; only works before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
