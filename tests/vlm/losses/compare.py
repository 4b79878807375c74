"""What the tests of the losses share: inputs, every pairwise loss, and an exact comparison."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support import unit_rows
from vlm.losses import clip_loss, cross_uniformity, dcl_loss, siglip_loss, uniformity

Loss = Callable[..., Tensor]

SCALE = torch.tensor([14.3], dtype=torch.float64)
BIAS = torch.tensor([-3.0], dtype=torch.float64)
IDS = torch.randint(0, 9, (23,), generator=torch.Generator().manual_seed(0))


def value_and_gradients(loss: Loss, *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach(), *gradients]


def features(rows: int = 23, dim: int = 6) -> tuple[Tensor, Tensor]:
    return unit_rows(rows, dim), unit_rows(rows, dim, seed=1)


def assert_same(ours: Loss, theirs: Loss, *inputs: Tensor) -> None:
    found, expected = value_and_gradients(ours, *inputs), value_and_gradients(theirs, *inputs)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


ALL: dict[str, Loss] = {
    "clip": lambda i, t, s, b, g: clip_loss(i, t, s, group_ids=g),
    "clip_mask": lambda i, t, s, b, g: clip_loss(
        i, t, s, group_ids=g, same_group="mask", label_smoothing=0.1
    ),
    "siglip": lambda i, t, s, b, g: siglip_loss(i, t, s, b, group_ids=g),
    "dcl": lambda i, t, s, b, g: dcl_loss(i, t, s, group_ids=g, weight_sigma=0.5),
    "uniformity": lambda i, t, s, b, g: uniformity(i, group_ids=g) + uniformity(t, group_ids=g),
    "cross_uniformity": lambda i, t, s, b, g: cross_uniformity(i, t, group_ids=g),
}
