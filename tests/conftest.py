"""Shared by every test: `import vlm` comes first, so that torchvision imports on a CPU torch."""

import signal

import pytest
from hypothesis import settings

import vlm
from vlm.openmp import let_idle_threads_sleep

assert vlm.__version__
let_idle_threads_sleep()
# A busy machine fails no test for being slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# A shell that runs the suite in the background ignores SIGINT, and so would the processes that
# tests start and then interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with the longest tests first, so that no process is left alone with them."""
    long = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    import torch

    torch.manual_seed(0)
