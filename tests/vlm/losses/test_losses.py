import dataclasses
import math
from collections.abc import Callable
from typing import Any

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch.testing import assert_close

from tests.support import unit_rows
from vlm.losses import (
    LossTerm,
    alignment,
    centroid_uniformity,
    clip_loss,
    cross_uniformity,
    dcl_loss,
    siglip_loss,
    total_loss,
    uniformity,
)
from vlm.types import Features

Loss = Callable[..., torch.Tensor]

SCALE = torch.tensor([14.3], dtype=torch.float64)
BIAS = torch.tensor([-3.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 1, 0, 2, 3, 3, 3, 4])


def gradients(loss: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return list(torch.autograd.grad(loss(*leaves), leaves))


def test_clip_loss_and_gradients_equal_open_clips() -> None:
    image, text = unit_rows(8, 6), unit_rows(8, 6, seed=1)
    reference = open_clip.loss.ClipLoss()

    def theirs(i: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return reference(i, t, s)

    assert_close(clip_loss(image, text, SCALE), theirs(image, text, SCALE))
    for ours, other in zip(
        gradients(clip_loss, image, text, SCALE), gradients(theirs, image, text, SCALE), strict=True
    ):
        assert_close(ours, other)


def test_siglip_loss_and_gradients_equal_open_clips() -> None:
    image, text = unit_rows(8, 6), unit_rows(8, 6, seed=1)
    reference = open_clip.loss.SigLipLoss()

    def theirs(i: torch.Tensor, t: torch.Tensor, s: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return reference(i, t, s, b)

    inputs = (image, text, SCALE, BIAS)
    assert_close(siglip_loss(*inputs), theirs(*inputs))
    for ours, other in zip(
        gradients(siglip_loss, *inputs), gradients(theirs, *inputs), strict=True
    ):
        assert_close(ours, other)


def test_label_smoothing_is_that_of_cross_entropy() -> None:
    image, text = unit_rows(8, 6), unit_rows(8, 6, seed=1)
    logits, rows = SCALE * image @ text.T, torch.arange(8)
    expected = 0.5 * (
        F.cross_entropy(logits, rows, label_smoothing=0.1)
        + F.cross_entropy(logits.T, rows, label_smoothing=0.1)
    )
    assert_close(clip_loss(image, text, SCALE, label_smoothing=0.1), expected)


def test_orthogonal_pairs_have_the_closed_form() -> None:
    eye = torch.eye(5, dtype=torch.float64)
    expected = math.log(math.exp(14.3) + 4) - 14.3
    assert_close(float(clip_loss(eye, eye, SCALE)), expected)


def test_masked_rows_of_a_group_are_no_negatives() -> None:
    image, text = unit_rows(8, 6), unit_rows(8, 6, seed=1)
    found = clip_loss(image, text, SCALE, group_ids=GROUPS, same_group="mask")
    logits = SCALE * image @ text.T
    total = 0.0
    for view in (logits, logits.T):
        for i in range(8):
            kept = [j for j in range(8) if j == i or GROUPS[j] != GROUPS[i]]
            total += float(view[i, kept].logsumexp(0) - view[i, i])
    assert_close(float(found), total / 16)


def test_positives_of_a_group_share_the_target_evenly() -> None:
    image, text = unit_rows(8, 6), unit_rows(8, 6, seed=1)
    found = clip_loss(image, text, SCALE, group_ids=GROUPS, same_group="positive")
    logits = SCALE * image @ text.T
    total = 0.0
    for view in (logits, logits.T):
        for i in range(8):
            members = [j for j in range(8) if GROUPS[j] == GROUPS[i]]
            total += float(view[i].logsumexp(0) - view[i, members].mean())
    assert_close(float(found), total / 16)


@pytest.mark.parametrize("same_group", ["positive", "mask", "negative"])
def test_distinct_groups_change_nothing(same_group: Any) -> None:
    image, text = unit_rows(8, 6), unit_rows(8, 6, seed=1)
    ids = torch.arange(8)
    plain = clip_loss(image, text, SCALE)
    assert_close(clip_loss(image, text, SCALE, group_ids=ids, same_group=same_group), plain)
    plain = siglip_loss(image, text, SCALE, BIAS)
    found = siglip_loss(image, text, SCALE, BIAS, group_ids=ids, same_group=same_group)
    assert_close(found, plain)


@pytest.mark.parametrize("same_group", ["positive", "mask"])
def test_siglip_asks_groups_for_yes_or_not_at_all(same_group: Any) -> None:
    image, text = unit_rows(8, 6), unit_rows(8, 6, seed=1)
    found = siglip_loss(image, text, SCALE, BIAS, group_ids=GROUPS, same_group=same_group)
    logits = SCALE * image @ text.T + BIAS
    total = 0.0
    for i in range(8):
        for j in range(8):
            same = bool(GROUPS[i] == GROUPS[j])
            if same and i != j and same_group == "mask":
                continue
            total -= float(F.logsigmoid(logits[i, j] if same else -logits[i, j]))
    assert_close(float(found), total / 8)


@pytest.mark.parametrize("same_group", ["positive", "mask"])
def test_identical_rows_at_scale_100_stay_finite(same_group: Any) -> None:
    row = unit_rows(1, 6).float().repeat(8, 1)
    scale = torch.tensor([100.0])
    found = gradients(
        lambda i, t, s: clip_loss(i, t, s, group_ids=GROUPS, same_group=same_group), row, row, scale
    )
    assert all(torch.isfinite(g).all() for g in found)


def direct_uniformity(left: torch.Tensor, right: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    squared = (left[:, None] - right[None]).square().sum(-1)
    return torch.log(torch.exp(-2 * squared)[keep].mean())


def test_gap_terms_equal_their_pairwise_distance_form_in_value_and_gradient() -> None:
    image, text = unit_rows(8, 6), unit_rows(8, 6, seed=1)
    keep = ~torch.eye(8, dtype=torch.bool)
    cases: list[tuple[Loss, Loss]] = [
        (lambda i, t: alignment(i, t), lambda i, t: (i - t).square().sum(1).mean()),
        (lambda i, t: uniformity(i), lambda i, t: direct_uniformity(i, i, keep)),
        (lambda i, t: cross_uniformity(i, t), lambda i, t: direct_uniformity(i, t, keep)),
    ]
    for ours, direct in cases:
        assert_close(ours(image, text), direct(image, text))
    # On the sphere the forms agree, so do the tangential parts of their gradients.
    for ours, direct in cases:
        leaves = image.clone().requires_grad_(), text.clone().requires_grad_()
        unit = [F.normalize(leaf, dim=1) for leaf in leaves]
        found = torch.autograd.grad(ours(*unit), leaves, allow_unused=True)
        unit = [F.normalize(leaf, dim=1) for leaf in leaves]
        expected = torch.autograd.grad(direct(*unit), leaves, allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert_close(a, b)


def test_uniformity_of_two_opposite_points_is_minus_4t() -> None:
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert_close(float(uniformity(opposite, t=2.0)), -8.0)


def test_uniformity_leaves_pairs_of_one_group_out() -> None:
    rows = unit_rows(8, 6)
    keep = GROUPS[:, None] != GROUPS[None]
    assert_close(uniformity(rows, group_ids=GROUPS), direct_uniformity(rows, rows, keep))


def test_uniformity_of_one_group_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="no pair to spread: 3 rows, all of one group"):
        uniformity(unit_rows(3, 4), group_ids=torch.zeros(3, dtype=torch.int64))


def test_centroid_uniformity_is_that_of_midpoints() -> None:
    image, text = unit_rows(8, 6), unit_rows(8, 6, seed=1)
    midpoints = F.normalize((image + text) / 2, dim=1)
    assert_close(centroid_uniformity(image, text), uniformity(midpoints))


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_every_loss_is_blind_to_rotation_and_to_the_order_of_pairs(seed: int) -> None:
    image, text = unit_rows(8, 6, seed=seed), unit_rows(8, 6, seed=seed + 1)
    rotation, _ = torch.linalg.qr(unit_rows(6, 6, seed=seed + 2))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    losses: list[Loss] = [
        lambda i, t, g: clip_loss(i, t, SCALE, group_ids=g),
        lambda i, t, g: siglip_loss(i, t, SCALE, BIAS, group_ids=g),
        lambda i, t, g: alignment(i, t),
        lambda i, t, g: cross_uniformity(i, t, group_ids=g),
        lambda i, t, g: dcl_loss(i, t, SCALE, group_ids=g),
        lambda i, t, g: centroid_uniformity(i, t, group_ids=g),
        lambda i, t, g: uniformity(i, group_ids=g),
    ]
    for loss in losses:
        plain = loss(image, text, GROUPS)
        assert_close(loss(image @ rotation, text @ rotation, GROUPS), plain)
        assert_close(loss(image[order], text[order], GROUPS[order]), plain)


def features(bias: bool = True) -> Features:
    return Features(
        image=unit_rows(8, 6).float(),
        text=unit_rows(8, 6, seed=1).float(),
        logit_scale=SCALE.float(),
        logit_bias=BIAS.float() if bias else None,
        group_ids=GROUPS,
        teacher_image=unit_rows(8, 9, seed=2).float(),
        teacher_text=unit_rows(8, 9, seed=3).float(),
        teacher_logit_scale=torch.tensor([20.0]),
    )


def term(tree: dict[str, Any]) -> Any:
    return TypeAdapter(LossTerm).validate_python(tree)


def test_the_total_is_the_weighted_sum_and_reports_each_term() -> None:
    terms = [term({"type": "clip"}), term({"type": "alignment", "weight": 0.5}),
             term({"type": "uniformity", "weight": 0.25})]  # fmt: skip
    result = total_loss(terms, features(), progress=0.0)
    values = result.statistics
    expected = values["clip"] + 0.5 * values["alignment"] + 0.25 * values["uniformity"]
    assert_close(result.total, expected)
    assert_close(values["clip/temperature"], torch.tensor(1 / 14.3))
    assert_close(float(values["clip/same_group_fraction"]), 8 / 56)
    assert 0 <= float(values["clip/negative_entropy"]) <= 1
    floor = -4 + 8 / 6
    expected = uniformity(features().image, group_ids=GROUPS) - floor
    assert_close(values["uniformity/image_above_floor"], expected)


def test_a_weight_schedule_is_piecewise_linear_over_training() -> None:
    scheduled = term({"type": "alignment", "weight": {"at": [0.25, 0.75], "value": [1.0, 3.0]}})
    weights = [scheduled.weight_at(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert weights == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_a_weight_schedule_that_does_not_rise_is_refused() -> None:
    with pytest.raises(ValueError, match="must rise"):
        term({"type": "alignment", "weight": {"at": [0.5, 0.5], "value": [1.0, 3.0]}})


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"type": "clip", "weight": float("nan")}, "finite number"),
        ({"type": "clip", "weight": {"at": [0, 1], "value": [1, float("inf")]}}, "finite number"),
        ({"type": "clip", "weight": {"at": [0, 200], "value": [0, 1]}}, "less than or equal to 1"),
        ({"type": "uniformity", "t": float("inf")}, "finite number"),
        ({"type": "isogclr", "lowest_temperature": 0.5}, "init_temperature=0.01 lies under"),
    ],
)
def test_numbers_that_no_run_could_use_are_refused(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        term(tree)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dcl", "alignment", "uniformity",
                                  "cross_uniformity", "centroid_uniformity", "cyclip", "soft_clip",
                                  "distillation"])  # fmt: skip
def test_every_term_computes_a_finite_scalar(kind: str) -> None:
    value, statistics = term({"type": kind}).compute(features())
    assert value.shape == ()
    assert torch.isfinite(value)
    assert all(torch.isfinite(figure) for figure in statistics.values())


def test_the_sigmoid_term_needs_a_bias() -> None:
    with pytest.raises(ValueError, match="needs a logit bias"):
        term({"type": "siglip"}).compute(features(bias=False))


@pytest.mark.parametrize("kind", ["soft_clip", "distillation"])
def test_a_term_with_a_teacher_says_that_there_is_none(kind: str) -> None:
    given = dataclasses.replace(features(), teacher_text=None)
    with pytest.raises(ValueError, match=f"{kind} needs the embeddings of a teacher"):
        term({"type": kind}).compute(given)


def test_cyclip_weighs_its_two_parts() -> None:
    value, parts = term({"type": "cyclip", "in_modal": 2.0, "cross_modal": 3.0}).compute(features())
    assert_close(value, 2 * parts["in_modal"] + 3 * parts["cross_modal"])
