import torch
from torch.testing import assert_close

from tests.support import unit_rows
from vlm.losses.statistics import contrastive_statistics
from vlm.types import Features

IDS = torch.tensor([0, 1, 0, 2, 3, 3, 3, 4])


def features(ids: torch.Tensor, scale: float = 20.0, *, alike: bool = False) -> Features:
    text = unit_rows(1, 6).repeat(len(ids), 1) if alike else unit_rows(len(ids), 6, seed=1)
    return Features(
        image=unit_rows(len(ids), 6),
        text=text,
        logit_scale=torch.tensor([scale], dtype=torch.float64),
        logit_bias=None,
        group_ids=ids,
    )


def test_similarities_are_the_means_over_their_pairs() -> None:
    given = features(IDS)
    cosines = given.image @ given.text.T
    found = contrastive_statistics(given)
    assert_close(found["positive_similarity"], cosines.diagonal().mean())
    assert_close(found["negative_similarity"], cosines[IDS[:, None] != IDS[None]].mean())
    assert_close(found["temperature"].item(), 0.05)
    assert_close(found["same_group_fraction"].item(), 8 / 56)


def test_entropy_of_negatives_is_1_when_all_push_alike_and_0_when_one_does() -> None:
    alike = contrastive_statistics(features(IDS, alike=True))
    assert_close(alike["negative_entropy"].item(), 1.0)
    sharp = contrastive_statistics(features(torch.arange(8), scale=1e5))
    assert sharp["negative_entropy"].item() < 1e-6


def test_entropy_is_the_mean_over_an_even_sample_of_a_large_batch() -> None:
    given = features(torch.arange(600) // 2)
    every = (given.image @ given.text.T * 20)[::3]
    kept = (torch.arange(600) // 2)[::3, None] != (torch.arange(600) // 2)[None]
    rows = [row[keep].softmax(0) for row, keep in zip(every, kept, strict=True)]
    entropies = [-(row * row.log()).sum() / torch.tensor(598.0).log() for row in rows]
    found = contrastive_statistics(given)["negative_entropy"]
    assert_close(found, torch.stack(entropies).mean(), rtol=1e-6, atol=0)


def test_nothing_is_said_of_negatives_where_a_row_has_fewer_than_two() -> None:
    found = contrastive_statistics(features(torch.tensor([0, 0, 1])))
    assert "negative_entropy" not in found
    assert "negative_similarity" not in found
