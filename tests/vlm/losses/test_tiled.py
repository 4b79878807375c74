from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.support import unit_rows
from tests.vlm.losses import direct
from vlm.losses import (
    centroid_uniformity,
    clip_loss,
    cross_uniformity,
    dcl_loss,
    siglip_loss,
    tiled,
    uniformity,
)
from vlm.losses.pairs import Pairs
from vlm.losses.tiled import log_sum_exp, log_sum_exp_both_ways, softplus_sums

Loss = Callable[..., Tensor]

SCALE = torch.tensor([14.3], dtype=torch.float64)
BIAS = torch.tensor([-3.0], dtype=torch.float64)
IDS = torch.randint(0, 9, (23,), generator=torch.Generator().manual_seed(0))
MODES = ["positive", "mask", "negative"]


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


@pytest.fixture(params=[1, 5, 23, 64], ids="tile{}".format)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    side: int = request.param
    monkeypatch.setattr(tiled, "_CPU_TILE", side)
    return side


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mode", MODES)
def test_clip_equals_its_direct_form_in_value_and_every_gradient(
    mode: Any, smoothing: float
) -> None:
    assert_same(
        lambda i, t, s: clip_loss(
            i, t, s, group_ids=IDS, same_group=mode, label_smoothing=smoothing
        ),
        lambda i, t, s: direct.clip(i, t, s, ids=IDS, mode=mode, smoothing=smoothing),
        *features(),
        SCALE,
    )


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("mode", MODES)
def test_siglip_equals_its_direct_form_in_value_and_every_gradient(mode: Any) -> None:
    assert_same(
        lambda i, t, s, b: siglip_loss(i, t, s, b, group_ids=IDS, same_group=mode),
        lambda i, t, s, b: direct.siglip(i, t, s, b, ids=IDS, mode=mode),
        *features(),
        SCALE,
        BIAS,
    )


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("sigma", [None, 0.5])
@pytest.mark.parametrize("mode", MODES)
def test_dcl_equals_its_direct_form_in_value_and_every_gradient(
    mode: Any, sigma: float | None
) -> None:
    assert_same(
        lambda i, t, s: dcl_loss(i, t, s, group_ids=IDS, same_group=mode, weight_sigma=sigma),
        lambda i, t, s: direct.dcl(i, t, s, ids=IDS, mode=mode, sigma=sigma),
        *features(),
        SCALE,
    )


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("group_ids", [None, IDS], ids=["alone", "groups"])
@pytest.mark.parametrize("t", [0.7, 2.0])
def test_uniformities_equal_their_direct_forms_in_value_and_every_gradient(
    group_ids: Tensor | None, t: float
) -> None:
    ids = torch.arange(23) if group_ids is None else group_ids
    assert_same(
        lambda i, _: uniformity(i, t=t, group_ids=group_ids),
        lambda i, _: direct.uniformity(i, i, ids=ids, t=t),
        *features(),
    )
    assert_same(
        lambda i, x: cross_uniformity(i, x, t=t, group_ids=group_ids),
        lambda i, x: direct.uniformity(i, x, ids=ids, t=t),
        *features(),
    )

    def of_centroids(image: Tensor, text: Tensor) -> Tensor:
        midpoints = torch.nn.functional.normalize((image + text) / 2, dim=1)
        return direct.uniformity(midpoints, midpoints, ids=ids, t=t)

    assert_same(
        lambda i, x: centroid_uniformity(i, x, t=t, group_ids=group_ids), of_centroids, *features()
    )


def test_dcl_is_clip_with_the_positive_out_of_the_denominator() -> None:
    eye = torch.eye(5, dtype=torch.float64)  # every negative has logit 0
    assert_close(dcl_loss(eye, eye, SCALE), torch.tensor(4.0, dtype=torch.float64).log() - SCALE[0])


def test_dclw_weighs_equal_pairs_by_one() -> None:
    image = unit_rows(7, 6)
    assert_close(dcl_loss(image, image, SCALE, weight_sigma=0.5), dcl_loss(image, image, SCALE))


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.int64), None])
def test_dcl_without_negatives_says_so(ids: Tensor | None) -> None:
    rows = unit_rows(1 if ids is None else 3, 6)
    with pytest.raises(ValueError, match="a row has no negative"):
        dcl_loss(rows, rows, SCALE, group_ids=ids)


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


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("name", ALL)
def test_identical_rows_at_scale_100_are_finite_in_value_and_gradient(name: str) -> None:
    row = unit_rows(1, 6).float().repeat(23, 1)
    scale, bias = torch.tensor([100.0]), torch.tensor([-10.0])
    for ids in (None, IDS):
        results = value_and_gradients(lambda *x: ALL[name](*x, ids), row, row, scale, bias)  # noqa: B023
        assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("name", ALL)
def test_opposite_pairs_at_scale_100_are_exact_where_naive_exponentials_overflow(name: str) -> None:
    image = unit_rows(23, 6)
    inputs = (image, -image, torch.tensor([100.0]), torch.tensor([-10.0]))
    exact = value_and_gradients(lambda *x: ALL[name](*x, IDS), *(x.double() for x in inputs))
    found = value_and_gradients(lambda *x: ALL[name](*x, IDS), *(x.float() for x in inputs))
    for a, b in zip(found, exact, strict=True):
        assert_close(a.double(), b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("name", ALL)
def test_bfloat16_features_lose_nothing_but_their_own_rounding(name: str) -> None:
    image, text = (rows.bfloat16() for rows in features())
    scale, bias = SCALE.float(), BIAS.float()
    found = value_and_gradients(lambda *x: ALL[name](*x, IDS), image, text, scale, bias)
    exact = value_and_gradients(
        lambda *x: ALL[name](*x, IDS), image.double(), text.double(), scale.double(), bias.double()
    )
    assert found[0].dtype == torch.float32
    assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    assert [g.dtype for g in found[1:]] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for a, b in zip(found[1:], exact[1:], strict=True):  # rounded to bfloat16 once, at the end
        tolerance = 2.0**-7 if a.dtype == torch.bfloat16 else 1e-4
        assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_nothing(name: str) -> None:
    inputs = [*(rows.float() for rows in features()), SCALE.float(), BIAS.float()]
    plain = value_and_gradients(lambda *x: ALL[name](*x, IDS), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = value_and_gradients(lambda *x: ALL[name](*x, IDS), *inputs)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["clip", "siglip", "dcl"])
def test_a_frozen_input_leaves_the_other_gradients_as_they_are(name: str, frozen: int) -> None:
    inputs = [*features(), SCALE, BIAS]
    full = value_and_gradients(lambda *x: ALL[name](*x, IDS), *inputs)[1:]
    leaves = [x.clone().requires_grad_(place != frozen) for place, x in enumerate(inputs)]
    free = [leaf for place, leaf in enumerate(leaves) if place != frozen]
    found = torch.autograd.grad(
        ALL[name](*leaves, IDS), free, allow_unused=True, materialize_grads=True
    )
    expected = [gradient for place, gradient in enumerate(full) if place != frozen]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


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
