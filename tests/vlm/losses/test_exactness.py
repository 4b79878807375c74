from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support import unit_rows
from tests.vlm.losses import direct
from tests.vlm.losses.compare import (
    ALL,
    BIAS,
    IDS,
    SCALE,
    assert_same,
    features,
    value_and_gradients,
)
from vlm.losses import (
    centroid_uniformity,
    clip_loss,
    cross_uniformity,
    dcl_loss,
    siglip_loss,
    uniformity,
)

MODES = ["positive", "mask", "negative"]


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
