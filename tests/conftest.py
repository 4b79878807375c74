"""Shared by every test: `import vlm` comes first, so that torchvision imports on a CPU torch."""

import pytest
import torch

import vlm

assert vlm.__version__


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
