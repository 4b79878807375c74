"""Processes that share the rows of all reductions have what one process has, for their part of it.

Threads stand for processes: they meet where ranks would, and compute in float64.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import unit_rows
from vlm.losses import LossTerm, total_loss
from vlm.losses.pairs import Pairs
from vlm.losses.tiled import log_sum_exp, log_sum_exp_both_ways, softplus_sums
from vlm.types import WHOLE, Features, LossOutput, RowShare

Found = TypeVar("Found")
TERMS: dict[str, dict[str, Any]] = {
    "clip": {"type": "clip"},
    "clip_mask": {"type": "clip", "same_group": "mask", "label_smoothing": 0.1},
    "clip_similar": {"type": "clip", "false_negatives": {"by": "either", "cosine": 0.3}},
    "siglip": {"type": "siglip"},
    "dcl": {"type": "dcl", "weight_sigma": 0.5},
    "uniformity": {"type": "uniformity"},
    "cross_uniformity": {"type": "cross_uniformity"},
    "centroid_uniformity": {"type": "centroid_uniformity"},
    "cyclip": {"type": "cyclip"},
    "soft_clip": {"type": "soft_clip", "similarity": "own"},
    "distillation": {"type": "distillation"},
    "sogclr": {"type": "sogclr", "false_negatives": {"by": "text", "cosine": 0.3}},
    "isogclr": {"type": "isogclr", "init_temperature": 0.1},
    "fastclip_v3": {"type": "fastclip_v3"},
}


class Meeting:
    """What W threads tell each other."""

    def __init__(self, count: int) -> None:
        self._barrier = Barrier(count, timeout=60)
        self._told: list[Tensor] = [torch.empty(0)] * count

    def share(self, index: int) -> RowShare:
        return RowShare(
            index=index,
            count=len(self._told),
            total=lambda values: _Total.apply(values, self, index),  # type: ignore[no-untyped-call] # torch has no types here
            largest=lambda values: self.hear(index, values).amax(dim=0),
        )

    def hear(self, index: int, values: Tensor) -> Tensor:
        self._told[index] = values.detach()
        self._barrier.wait()
        together = torch.stack(self._told)
        self._barrier.wait()
        return together


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, meeting: Meeting, index: int) -> Tensor:
        ctx.meeting, ctx.index = meeting, index
        return meeting.hear(index, values).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.meeting.hear(ctx.index, gradients[0]).sum(dim=0), None, None


def together(count: int, run: Callable[[RowShare], Found]) -> list[Found]:
    meeting = Meeting(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, map(meeting.share, range(count))))


def loss_of(
    term: dict[str, Any], share: RowShare, *, rows: int = 23, dim: int = 6
) -> tuple[LossOutput, list[Tensor]]:
    """The loss, and its gradients in images, captions, scale and bias."""
    leaves = [
        unit_rows(rows, dim),
        unit_rows(rows, dim, seed=1),
        torch.tensor([14.3], dtype=torch.float64),
        torch.tensor([-3.0], dtype=torch.float64),
    ]
    image, text, scale, bias = (leaf.requires_grad_() for leaf in leaves)
    features = Features(
        image=image,
        text=text,
        logit_scale=scale,
        logit_bias=bias,
        group_ids=torch.arange(rows) // 2,
        teacher_image=unit_rows(rows, 5, seed=2),
        teacher_text=unit_rows(rows, 5, seed=3),
        teacher_logit_scale=torch.tensor([9.0], dtype=torch.float64),
        share=share,
    )
    result = total_loss([TypeAdapter(LossTerm).validate_python(term)], features, progress=0.5)
    gradients = torch.autograd.grad(result.total, leaves, allow_unused=True, materialize_grads=True)
    return result, list(gradients)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("tile", [5], indirect=True)
@pytest.mark.parametrize("name", TERMS)
def test_a_shared_term_has_the_value_of_the_whole_and_its_gradient_in_the_mean(name: str) -> None:
    expected, whole = loss_of(TERMS[name], WHOLE)
    found = together(3, lambda share: loss_of(TERMS[name], share))
    for result, _ in found:
        assert_close(result.total, expected.total, rtol=1e-9, atol=1e-12)
        assert_close(result.statistics, expected.statistics, rtol=1e-9, atol=1e-12)
        assert_close(result.memory.samples, expected.memory.samples, rtol=1e-9, atol=1e-12)
    for parts, gradient in zip(zip(*(g for _, g in found), strict=True), whole, strict=True):
        assert_close(torch.stack(parts).mean(dim=0), gradient, rtol=1e-9, atol=1e-12)


def test_a_reduction_of_reductions_is_exact_too_and_more_processes_than_rows_are_idle() -> None:
    def run(share: RowShare) -> list[Tensor]:
        rows, columns = unit_rows(4, 6), unit_rows(7, 6, seed=1)
        leaves = [rows.requires_grad_(), columns.requires_grad_()]
        scale, pairs = torch.tensor([5.0], dtype=torch.float64), Pairs(left_out="match")
        by_row, by_column = log_sum_exp_both_ways(
            rows, columns, scale, pairs=pairs, share=share, tile=2
        )
        again = by_row[:, None] * rows  # differs in rows, hence in the gradients of threads
        sums = softplus_sums(again, columns, scale, -scale, pairs=pairs, share=share)
        last = log_sum_exp(sums[:, None], by_column[:, None], scale, pairs=pairs, share=share)
        repeated = log_sum_exp(sums[:, None] * rows, columns, scale, pairs=pairs)  # by all threads
        total = (last * repeated).sum()
        return [last.detach(), *torch.autograd.grad(total, leaves)]

    value, *gradients = run(WHOLE)
    found = together(6, run)
    for part in found:
        assert_close(part[0], value)
    for place, gradient in enumerate(gradients, start=1):
        assert_close(torch.stack([part[place] for part in found]).mean(dim=0), gradient)


def test_a_row_and_a_column_without_pairs_stay_at_minus_infinity() -> None:
    ids = torch.zeros(4, dtype=torch.int64)
    pairs = Pairs(left_out="group", row_groups=ids, column_groups=ids)
    rows, scale = unit_rows(4, 6), torch.tensor([5.0], dtype=torch.float64)
    for found in together(
        2, lambda s: log_sum_exp_both_ways(rows, rows, scale, pairs=pairs, share=s)
    ):
        assert all(bool((way == -torch.inf).all()) for way in found)


class _Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch has no types here
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TERMS)
def test_the_products_of_a_process_fall_as_their_number_grows(name: str) -> None:
    def products(share: RowShare) -> int:
        with _Products() as products:
            loss_of(TERMS[name], share, rows=64, dim=8)
        return products.count

    whole = products(WHOLE)
    assert whole >= 3 * 64 * 64 * 8 or name == "cyclip"
    for count in (2, 4, 8):
        assert [products(RowShare(index=i, count=count)) for i in range(count)] == [
            whole // count
        ] * count
