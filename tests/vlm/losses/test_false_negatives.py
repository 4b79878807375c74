"""A teacher's mask against whole matrices, in every contrastive loss and mode."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor
from torch.testing import assert_close

from tests.support import unit_rows
from tests.vlm.losses.compare import BIAS, IDS, SCALE, assert_same, features
from vlm.losses import LossTerm, clip_loss, dcl_loss, siglip_loss
from vlm.losses.pairs import Pairs, Similar, num_left_out
from vlm.types import Features

MODES = ["positive", "mask", "negative"]
TEACHER = unit_rows(23, 3, seed=7)
SIMILAR = (Similar(rows=TEACHER, columns=TEACHER, above=0.8),)
EYE = torch.eye(23, dtype=torch.bool)


def masks(mode: str) -> tuple[Tensor, Tensor]:
    """Positives, and pairs that a denominator without its positives leaves out."""
    same = IDS[:, None] == IDS[None] if mode != "negative" else EYE
    near = (TEACHER @ TEACHER.T > 0.8) & ~same
    assert 20 < int(near.sum()) < 400
    return same, near


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("mode", MODES)
def test_clip_leaves_similar_pairs_out_of_the_denominator(mode: Any) -> None:
    same, near = masks(mode)
    positives = same if mode == "positive" else EYE
    left_out = near | (same & ~EYE) if mode == "mask" else near

    def direct(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T
        total = image.new_zeros(())
        for way in (logits, logits.T):
            kept = way.masked_fill(left_out, -torch.inf).logsumexp(dim=1)
            total = total + (kept - (way * positives).sum(1) / positives.sum(1)).mean()
        return total / 2

    assert_same(
        lambda i, t, s: clip_loss(i, t, s, group_ids=IDS, same_group=mode, similar=SIMILAR),
        direct, *features(), SCALE,
    )  # fmt: skip


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("mode", MODES)
def test_siglip_does_not_ask_about_similar_pairs(mode: Any) -> None:
    same, near = masks(mode)
    positives = same if mode == "positive" else EYE
    asked = ~near & ~(same & ~EYE) if mode == "mask" else ~near

    def direct(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * image @ text.T + bias
        return -F.logsigmoid(torch.where(positives, logits, -logits))[asked].sum() / 23

    assert_same(
        lambda i, t, s, b: siglip_loss(
            i, t, s, b, group_ids=IDS, same_group=mode, similar=SIMILAR
        ),
        direct, *features(), SCALE, BIAS,
    )  # fmt: skip


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("mode", MODES)
def test_dcl_leaves_similar_pairs_out_and_rows_without_negatives_push_nothing(mode: Any) -> None:
    same, near = masks(mode)
    near = near | ((TEACHER @ TEACHER.T > -2) & (torch.arange(23) == 3)[:, None] & ~same)
    near = near | near.T
    # A teacher to whom sample 3 is like every other: its rows and columns are masked whole.
    odd = torch.zeros(23, 1, dtype=torch.float64)
    rows, columns = TEACHER.clone(), TEACHER.clone()
    three = odd.clone()
    three[3] = 9.0
    ones = odd + 1
    wide_rows = torch.cat([rows, three, ones], dim=1)
    wide_columns = torch.cat([columns, ones, three], dim=1)
    similar = (Similar(rows=wide_rows, columns=wide_columns, above=0.8),)
    left_out = near | same

    def direct(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T
        keep = same if mode == "positive" else EYE
        total = image.new_zeros(())
        for way in (logits, logits.T):
            negatives = way.masked_fill(left_out, -torch.inf)
            kept = [r.logsumexp(0) for r, out in zip(negatives, left_out, strict=True)
                    if not out.all()]  # fmt: skip
            total = total + torch.stack(kept).sum() / 23
            total = total - ((way * keep).sum(1) / keep.sum(1)).mean()
        return total / 2

    assert int(left_out.all(dim=1).sum()) == 1
    assert_same(
        lambda i, t, s: dcl_loss(i, t, s, group_ids=IDS, same_group=mode, similar=similar),
        direct, *features(), SCALE,
    )  # fmt: skip


def test_counts_are_those_of_the_mask() -> None:
    _, near = masks("mask")
    pairs = Pairs(similar=SIMILAR, row_groups=IDS, column_groups=IDS)
    for tile in (1, 7, 64):
        found = num_left_out(pairs, 23, 23, torch.device("cpu"), tile=tile)
        assert torch.equal(found, near.sum(dim=1))


def given() -> Features:
    image, text = features()
    return Features(
        image=image, text=text, logit_scale=SCALE, logit_bias=BIAS, group_ids=IDS,
        teacher_image=unit_rows(23, 3, seed=8), teacher_text=TEACHER, teacher_logit_scale=SCALE,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["clip", "siglip", "dcl"])
def test_terms_mask_by_captions_images_or_either_and_report_the_share(kind: str) -> None:
    shares = {}
    for by in ("text", "image", "either"):
        tree = {"type": kind, "false_negatives": {"by": by, "cosine": 0.8}}
        _, statistics = TypeAdapter(LossTerm).validate_python(tree).compute(given())
        shares[by] = float(statistics["masked_fraction"])
    _, near = masks("positive")
    assert shares["text"] == pytest.approx(float(near.sum()) / (23 * 22))
    assert shares["image"] != shares["text"]
    assert max(shares.values()) == shares["either"] <= shares["text"] + shares["image"]


def test_a_mask_and_label_smoothing_exclude_each_other() -> None:
    tree = {"type": "clip", "label_smoothing": 0.1, "false_negatives": {}}
    with pytest.raises(ValueError, match="exclude each other"):
        TypeAdapter(LossTerm).validate_python(tree)
    with pytest.raises(ValueError, match="cannot be spread over a similarity mask"):
        clip_loss(*features(), SCALE, similar=SIMILAR, label_smoothing=0.1)


def test_a_teacher_that_finds_nothing_alike_changes_nothing() -> None:
    none = (Similar(rows=TEACHER, columns=TEACHER, above=1.0 - 1e-9),)
    assert_close(clip_loss(*features(), SCALE, similar=none), clip_loss(*features(), SCALE))
