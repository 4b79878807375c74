"""Soft targets and distillation against whole matrices, and against open_clip's distillation."""

import dataclasses

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tests.support import unit_rows
from tests.vlm.losses.compare import SCALE, assert_same, features, value_and_gradients
from tests.vlm.losses.test_tiled import saved_bytes
from vlm.losses import SoftTarget, clip_loss, soft_target_loss
from vlm.losses.averages import softmax_average
from vlm.losses.pairs import Pairs, negative_pairs
from vlm.losses.soft import multi_hot
from vlm.losses.soft_terms import SoftClipTerm
from vlm.types import Features

TEACHER_SCALE = torch.tensor([9.0], dtype=torch.float64)


def target(rows: Tensor, columns: Tensor) -> SoftTarget:
    return SoftTarget(rows=rows, columns=columns, scale=TEACHER_SCALE.to(rows.dtype))


def direct(image: Tensor, text: Tensor, scale: Tensor, a: float, *targets: SoftTarget) -> Tensor:
    total = image.new_zeros(())
    for logits, given in zip(
        (scale * image @ text.T, scale * text @ image.T), targets, strict=True
    ):
        q = (given.scale * given.rows @ given.columns.T).softmax(dim=1)
        p = (1 - a) * torch.eye(len(q), dtype=q.dtype) + a * q
        total = total + F.kl_div(logits.log_softmax(dim=1), p, reduction="batchmean")
    return total / 2


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("cross", [False, True], ids=["in_modal", "cross_modal"])
def test_soft_targets_equal_their_divergence_in_value_and_every_gradient(
    fraction: float, cross: bool
) -> None:
    i, t = unit_rows(23, 9, seed=4), unit_rows(23, 9, seed=5)  # a teacher of another width
    pair = (target(i, t), target(t, i)) if cross else (target(i, i), target(t, t))
    assert_same(
        lambda i, t, s: soft_target_loss(
            i, t, s, for_images=pair[0], for_texts=pair[1], soft_fraction=fraction
        ),
        lambda i, t, s: direct(i, t, s, fraction, *pair),
        *features(),
        SCALE,
    )


def test_without_a_soft_share_it_is_infonce() -> None:
    same = target(unit_rows(23, 9), unit_rows(23, 9))
    assert_same(
        lambda i, t, s: soft_target_loss(
            i, t, s, for_images=same, for_texts=same, soft_fraction=0.0
        ),
        lambda i, t, s: clip_loss(i, t, s),
        *features(),
        SCALE,
    )


def test_gradients_of_distillation_are_open_clips() -> None:
    teacher_image, teacher_text = unit_rows(23, 9, seed=4), unit_rows(23, 9, seed=5)
    reference = open_clip.loss.DistillClipLoss()
    ours = value_and_gradients(
        lambda i, t, s: soft_target_loss(
            i, t, s,
            for_images=target(teacher_image, teacher_text),
            for_texts=target(teacher_text, teacher_image),
        ),
        *features(), SCALE,
    )  # fmt: skip
    theirs = value_and_gradients(
        lambda i, t, s: reference(i, t, s, teacher_image, teacher_text, TEACHER_SCALE)[1],
        *features(),
        SCALE,
    )
    for found, expected in zip(ours[1:], theirs[1:], strict=True):
        assert_close(found, expected)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient() -> None:
    image, text = features()
    results = value_and_gradients(
        lambda i, t, s: soft_target_loss(
            i, t, s,
            for_images=SoftTarget(rows=image, columns=text, scale=SCALE),
            for_texts=SoftTarget(rows=text, columns=image, scale=SCALE),
        ),
        image, text, SCALE,
    )  # fmt: skip
    for result in results:
        assert_close(result, torch.zeros_like(result), atol=1e-12, rtol=0)


def test_multi_hot_labels_share_the_target_by_their_overlap() -> None:
    labels = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    rows = F.normalize(labels, dim=1)
    cosines = torch.tensor([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]], dtype=torch.float64)
    image, text = unit_rows(3, 6), unit_rows(3, 6, seed=1)
    found = soft_target_loss(
        image, text, SCALE, for_images=target(rows, rows), for_texts=target(rows, rows)
    )
    p = (TEACHER_SCALE * cosines).softmax(dim=1)
    logits = SCALE * image @ text.T
    expected = sum(
        F.kl_div(way.log_softmax(dim=1), p, reduction="batchmean") for way in (logits, logits.T)
    )
    assert_close(found, torch.as_tensor(expected) / 2)


def test_label_sets_are_compared_by_their_cosine_and_no_label_is_like_itself_alone() -> None:
    ids = torch.tensor([[7, 5], [5, 9], [-1, -1], [7, -1], [-1, -1]])
    rows = multi_hot(ids)
    half = 0.5**0.5
    expected = torch.eye(5)
    expected[0, 1] = expected[1, 0] = 0.5
    expected[0, 3] = expected[3, 0] = half
    assert_close(rows @ rows.T, expected)
    given = Features(
        image=unit_rows(5, 6), text=unit_rows(5, 6, seed=1), logit_scale=SCALE, logit_bias=None,
        group_ids=torch.arange(5), label_ids=ids,
    )  # fmt: skip
    term = SoftClipTerm(similarity="labels", temperature=0.1, soft_fraction=0.4)
    wide = rows.double()
    labels = SoftTarget(rows=wide, columns=wide, scale=torch.full_like(SCALE, 10.0))
    found = soft_target_loss(
        given.image, given.text, SCALE, for_images=labels, for_texts=labels, soft_fraction=0.4
    )
    assert_close(term.compute(given)[0], found)
    with pytest.raises(ValueError, match="similarity=labels needs label_ids, and there are none"):
        term.compute(dataclasses.replace(given, label_ids=None))


@pytest.mark.usefixtures("tile")
def test_averages_leave_pairs_out_and_a_row_without_pairs_is_zero() -> None:
    rows, values = unit_rows(4, 6), unit_rows(4, 5, seed=1)
    ids = torch.tensor([0, 0, 1, 2])
    found = softmax_average(rows, rows, SCALE, values, pairs=negative_pairs(ids))
    logits = (SCALE * rows @ rows.T).masked_fill(ids[:, None] == ids[None], -torch.inf)
    assert_close(found.values, logits.softmax(dim=1) @ values)
    assert_close(found.log_sum_exp, logits.logsumexp(dim=1))
    alone = softmax_average(
        rows, rows, SCALE, values, pairs=negative_pairs(torch.zeros(4, dtype=torch.int64))
    )
    assert torch.equal(alone.values, torch.zeros(4, 5, dtype=torch.float64))
    assert torch.equal(alone.logits, torch.zeros(4, dtype=torch.float64))


def test_bytes_kept_by_soft_targets_are_linear_in_the_batch() -> None:
    kept = []
    for size in (256, 512, 1024):
        image, text = (x.float().requires_grad_() for x in features(size, 8))
        scale = SCALE.float().requires_grad_()
        teacher = unit_rows(size, 8, seed=4).float()
        same = target(teacher, teacher)
        kept.append(
            saved_bytes(
                lambda: soft_target_loss(image, text, scale, for_images=same, for_texts=same),  # noqa: B023
                image, text, scale, teacher,
            )
        )  # fmt: skip
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.05)
    assert kept[2] < 1024 * 1024


def test_a_sharp_softmax_averages_nothing_but_the_nearest() -> None:
    rows, values = unit_rows(5, 6).float(), unit_rows(5, 6, seed=1).float()
    sharp = softmax_average(rows, rows, torch.tensor([1e4]), values, pairs=Pairs())
    assert_close(sharp.values, values)
