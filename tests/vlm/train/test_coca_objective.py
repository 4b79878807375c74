"""Ranks together give CoCa the loss and gradients of one process, however tokens are spread."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import run_ranks
from tests.support import TINY_COCA
from vlm.distributed import World, sum_with_gradient
from vlm.losses import LossTerm
from vlm.models import CoCa, CocaConfig
from vlm.train.objective import global_loss

BATCH = 8
TERMS = [{"type": "clip"}, {"type": "caption", "weight": 2.0}]


def build() -> CoCa:
    torch.manual_seed(5)
    text = {**TINY_COCA["text"], "vocab_size": 60}
    config = CocaConfig.model_validate({**TINY_COCA, "text": text})
    return CoCa(config, image_size=16, context_length=9).double()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Captions of 0 to 7 words, the long ones last: ranks have 6 to 30 tokens."""
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    token_ids = torch.zeros(BATCH, 9, dtype=torch.int64)
    for words, row in enumerate(token_ids):
        row[0], row[words + 1] = 58, 59
        row[1 : words + 1] = torch.randint(0, 58, (words,), generator=generator)
    return images, token_ids


def step(world: World) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    images, token_ids = inputs()
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    model = build()
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    terms = [TypeAdapter(LossTerm).validate_python(tree) for tree in TERMS]
    output = wrapped(images[own], token_ids[own])
    loss = global_loss(output, torch.arange(BATCH)[own], terms, progress=0.5, world=world)
    loss.total.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    statistics = {name: float(value) for name, value in loss.statistics.items()}
    return float(loss.total.detach()), statistics, gradients


@pytest.mark.distributed
def test_ranks_together_equal_one_process() -> None:
    total, statistics, gradients = step(World())
    for found in run_ranks(4, step):
        assert found[0] == pytest.approx(total, rel=1e-6)
        assert found[1]["caption"] == pytest.approx(statistics["caption"], rel=1e-9)
        assert found[2].keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = float(gradient.abs().max()) + 1e-6
            assert float((found[2][name] - gradient).abs().max()) / scale < 1e-6, name


def summed(world: World) -> tuple[Any, Any]:
    values = torch.tensor([1.0 + world.rank, 10.0], requires_grad=True)
    total = sum_with_gradient(values, world)
    (total * torch.tensor([1.0, 2.0])).sum().backward()
    return total.tolist(), values.grad.tolist()  # type: ignore[union-attr] # backward has run


@pytest.mark.distributed
def test_a_sum_over_ranks_is_the_same_on_all_and_sums_gradients() -> None:
    assert summed(World()) == ([1.0, 10.0], [1.0, 2.0])
    assert run_ranks(2, summed) == [([3.0, 20.0], [2.0, 4.0])] * 2
