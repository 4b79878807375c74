"""The guard of a gap term's weight."""

from typing import Any

import torch
from pydantic import TypeAdapter
from torch.testing import assert_close

from tests.support import unit_rows
from vlm.losses import LossTerm, total_loss
from vlm.losses.guard import squared_centroid_gap
from vlm.types import Features, Memory


def features(shift: float, *, rows: int = 64, seed: int = 0) -> Features:
    """Captions are the images, moved by `shift` along the first axis."""
    image = unit_rows(rows, 6, seed=seed)
    text = image.clone()
    text[:, 0] += shift
    return Features(
        image=image, text=text, logit_scale=torch.ones(1, dtype=torch.float64), logit_bias=None,
        group_ids=torch.arange(rows),
    )  # fmt: skip


def term(**guard: Any) -> Any:
    tree = {"type": "alignment", "weight": {"at": [0, 1], "value": [0, 2]}, "guard": guard}
    return TypeAdapter(LossTerm).validate_python(tree)


def weights(guarded: Any, gaps: list[float]) -> list[float]:
    memory, found = Memory(), []
    for step, gap in enumerate(gaps):
        result = total_loss([guarded], features(gap), progress=step / len(gaps), memory=memory)
        memory = result.memory
        found.append(float(result.statistics["alignment/weight"]))
        assert_close(result.total, found[-1] * result.statistics["alignment"])
    return found


def test_the_weight_follows_its_schedule_until_the_gap_is_closed_and_then_stays() -> None:
    guarded = term(gap_floor=0.1, steps=1)
    found = weights(guarded, [0.5, 0.5, 0.5, 0.05, 0.5, 0.5, 0.01, 0.5])
    assert found == [0.0, 0.25, 0.5, 0.75, 0.75, 0.75, 0.75, 0.75]


def test_a_single_batch_below_the_floor_does_not_count_when_gaps_are_averaged() -> None:
    guarded = term(gap_floor=0.1, steps=10)
    assert weights(guarded, [0.5, 0.0, 0.5, 0.5])[-1] == 1.5


def test_the_squared_gap_is_without_bias_where_that_of_the_batch_is_not() -> None:
    gaps, plain = [], []
    for seed in range(400):
        image, text = unit_rows(8, 6, seed=seed), unit_rows(8, 6, seed=seed + 1000)
        given = Features(
            image=image, text=text, logit_scale=torch.ones(1), logit_bias=None,
            group_ids=torch.arange(8),
        )  # fmt: skip
        gaps.append(squared_centroid_gap(given))
        plain.append((image.mean(0) - text.mean(0)).square().sum())
    assert abs(float(torch.stack(gaps).mean())) < 0.02
    assert float(torch.stack(plain).mean()) > 0.2


def test_without_a_guard_nothing_is_remembered() -> None:
    plain = TypeAdapter(LossTerm).validate_python({"type": "alignment"})
    result = total_loss([plain], features(0.5), progress=0.5)
    assert result.memory == Memory()
    assert "alignment/weight" not in result.statistics
