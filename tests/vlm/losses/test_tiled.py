from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.support import unit_rows
from tests.vlm.losses.compare import ALL, BIAS, SCALE, assert_same, features
from vlm.losses.pairs import Pairs
from vlm.losses.tiled import log_sum_exp, log_sum_exp_both_ways, softplus_sums


@settings(deadline=None, max_examples=30)
@given(
    b=st.integers(1, 9),
    extra=st.integers(0, 9),
    first=st.integers(0, 9),
    tile=st.integers(1, 12),
    left_out=st.sampled_from(["none", "match", "group", "others_of_group"]),
)
def test_local_rows_against_a_global_batch_are_rows_of_the_whole(
    b: int,
    extra: int,
    first: int,
    tile: int,
    left_out: Literal["none", "match", "group", "others_of_group"],
) -> None:
    first = min(first, extra)
    columns = unit_rows(b + extra, 4)
    rows = unit_rows(b + extra, 4, seed=1)
    ids = torch.arange(b + extra) % 3
    local = slice(first, first + b)
    whole = Pairs(left_out=left_out, row_groups=ids, column_groups=ids)
    part = Pairs(left_out=left_out, row_groups=ids[local], column_groups=ids, first_row=first)
    expected, _ = log_sum_exp_both_ways(rows, columns, SCALE, pairs=whole)
    assert_close(log_sum_exp(rows[local], columns, SCALE, pairs=part, tile=tile), expected[local])
    expected = softplus_sums(rows, columns, SCALE, BIAS, pairs=whole)[local]
    assert_close(softplus_sums(rows[local], columns, SCALE, BIAS, pairs=part, tile=tile), expected)


def test_parts_of_rows_sum_to_the_gradient_of_the_whole() -> None:
    rows, columns = features(12)
    ids = torch.arange(12) % 5

    def by_parts(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
        parts = [
            Pairs(left_out="group", row_groups=ids[at : at + 4], column_groups=ids, first_row=at)
            for at in (0, 4, 8)
        ]
        values = [
            log_sum_exp(left[p.first_row : p.first_row + 4], right, scale, pairs=p, tile=5)
            for p in parts
        ]
        return torch.cat(values).mean()

    whole = Pairs(left_out="group", row_groups=ids, column_groups=ids)
    assert_same(
        by_parts,
        lambda left, right, scale: log_sum_exp(left, right, scale, pairs=whole).mean(),
        rows,
        columns,
        SCALE,
    )


def test_a_row_without_pairs_is_minus_infinity_and_sends_nothing_back() -> None:
    rows, columns = features(4)
    ids = torch.tensor([7, 7, 7, 7])
    pairs = Pairs(left_out="group", row_groups=torch.tensor([7, 1, 2, 3]), column_groups=ids)
    rows.requires_grad_()
    found = log_sum_exp(rows, columns, SCALE, pairs=pairs, tile=2)
    assert found[0] == -torch.inf
    assert torch.isfinite(found[1:]).all()
    found[1:].sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad[0], torch.zeros(6, dtype=torch.float64))
    assert torch.isfinite(rows.grad).all()


def test_groups_must_be_given_where_they_are_asked_for() -> None:
    rows, columns = features(4)
    with pytest.raises(ValueError, match="needs row_groups and column_groups"):
        log_sum_exp(rows, columns, SCALE, pairs=Pairs(left_out="group"))


def test_a_tile_of_nothing_is_refused() -> None:
    rows, columns = features(4)
    with pytest.raises(ValueError, match="got tile=0"):
        log_sum_exp(rows, columns, SCALE, pairs=Pairs(), tile=0)


def saved_bytes(run: Callable[[], Tensor], *inputs: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass beside the inputs themselves."""
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = run()
    assert value.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("reduction", ["log_sum_exp", "softplus_sums"])
def test_bytes_kept_for_local_rows_do_not_grow_with_the_global_batch(reduction: str) -> None:
    rows = unit_rows(16, 8).float().requires_grad_()
    scale, bias = SCALE.float().requires_grad_(), BIAS.float().requires_grad_()
    sizes = []
    for num_columns in (64, 256, 1024):
        columns = unit_rows(num_columns, 8).float().requires_grad_()
        run: dict[str, Callable[[], Tensor]] = {
            "log_sum_exp": lambda c=columns: log_sum_exp(  # type: ignore[misc]
                rows, c, scale, pairs=Pairs(left_out="match"), tile=32
            ),
            "softplus_sums": lambda c=columns: softplus_sums(  # type: ignore[misc]
                rows, c, scale, bias, pairs=Pairs(left_out="match"), tile=32
            ),
        }
        sizes.append(saved_bytes(run[reduction], rows, columns, scale, bias))
    assert sizes == [2 * 16 * 4 if reduction == "log_sum_exp" else 0] * 3


@pytest.mark.usefixtures("tile")
def test_both_ways_keep_two_numbers_a_row_and_a_column() -> None:
    rows, columns = (x.float().requires_grad_() for x in (unit_rows(16, 8), unit_rows(64, 8)))
    scale = SCALE.float().requires_grad_()
    kept = saved_bytes(
        lambda: log_sum_exp_both_ways(rows, columns, scale, pairs=Pairs())[0], rows, columns, scale
    )
    assert kept == 2 * (16 + 64) * 4


@pytest.mark.parametrize("name", ALL)
def test_bytes_kept_by_a_loss_are_linear_in_the_batch(name: str) -> None:
    kept = []
    for size in (256, 512, 1024):
        inputs = [*(x.float() for x in features(size, 8)), SCALE.float(), BIAS.float()]
        leaves = [x.requires_grad_() for x in inputs]
        ids = torch.arange(size) // 2
        kept.append(saved_bytes(lambda: ALL[name](*leaves, ids), *leaves))  # noqa: B023
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.05)
    assert kept[2] < 1024 * 1024  # a quarter of one float32 matrix of pairs
