"""Shared by every test: `import vlm` comes first, so that torchvision imports on a CPU torch."""

import pytest

import vlm
from vlm.openmp import let_idle_threads_sleep

assert vlm.__version__
let_idle_threads_sleep()


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    import torch

    torch.manual_seed(0)
