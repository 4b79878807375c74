"""Memory of a server that holds much for as long as it runs, and replaces it at times."""

import ctypes
import gc
import sys
from typing import Final

__all__ = ["settle_heap"]

_YOUNG_OBJECTS: Final = 10_000
"""Made since the last collection of the young; Python's 700 are those of three requests."""


def settle_heap() -> None:
    """Free what is garbage now, and leave all that lives out of later collections.

    A full collection walks half a million objects of torch and its like, for a third of a second in
    which nothing is answered; under load there is one every few seconds, and it frees nothing. For
    the process that is the server's own: what is left out is shared by all of a process.
    """
    gc.unfreeze()
    gc.collect()
    _give_back()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)


def _give_back() -> None:
    """Let the system have what was freed: glibc keeps the place of a model that has gone."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
