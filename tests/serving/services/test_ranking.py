from dataclasses import replace

import numpy as np
import pytest

from serving.services.ranking import (
    QueryBank,
    centred,
    combined,
    diversified,
    fused,
    grouped,
    percentiles,
    rescored,
    without_hubs,
)
from serving.stores import Hit


def hit(name: str, score: float = 0.0, *row: float) -> Hit:
    vector = np.array(row or (1.0, 0.0), np.float32)
    return Hit(id=name, score=score, text=None, metadata={}, has_thumbnail=False, vector=vector)


def names(hits: list[Hit]) -> list[str]:
    return [each.id for each in hits]


def test_centring_takes_the_mean_away_and_keeps_rows_unit() -> None:
    rows = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32)
    moved = centred(rows, np.array([0.6, 0.0], np.float32))
    np.testing.assert_allclose(moved, [[1, 0], [0, 1]], atol=1e-6)
    assert centred(rows, None) is rows
    assert np.isfinite(centred(rows, rows[0])).all()  # a row that is the mean itself


def test_parts_add_up_by_weight_and_may_cancel_out() -> None:
    first, second = np.eye(2, dtype=np.float32)
    assert combined([first, second], [1, -1]) == pytest.approx([0.5**0.5, -(0.5**0.5)])
    assert combined([first, second], [1, 0]) == pytest.approx([1, 0])
    assert combined([first, first], [1, -1]) is None


def test_a_mixed_gallery_is_ranked_by_what_is_shown_not_by_which_cone_it_lies_in() -> None:
    image_mean, text_mean = np.array([0.0, 0.9, 0.0]), np.array([0.0, 0.0, 0.9])
    meaning = np.array([[0.435, 0, 0], [-0.435, 0, 0]])
    images = [hit(f"image {n}", 0, *(image_mean + m)) for n, m in enumerate(meaning)]
    texts = [
        replace(hit(f"text {n}", 0, *(text_mean + m)), modality="text")
        for n, m in enumerate(meaning)
    ]
    query = (text_mean + meaning[0]).astype(np.float32)
    raw = sorted([*images, *texts], key=lambda h: -float(query @ h.vector))
    assert names(raw) == ["text 0", "text 1", "image 0", "image 1"]  # a wrong text before the image
    means = {"image": image_mean, "text": text_mean}
    ranked = rescored(centred(query, text_mean), [*images, *texts], means)  # type: ignore[arg-type] # mypy widens the keys
    assert names(ranked) == ["image 0", "text 0", "image 1", "text 1"]
    assert ranked[0].score == pytest.approx(1)
    assert rescored(query, [], {}) == []


def test_a_hub_loses_to_what_only_this_query_is_near_to() -> None:
    hub, own = hit("hub", 0.75, 0.75, 0.66), hit("own", 0.74, 0.74, -0.67)
    rows = np.array([[0.6, 0.8], [0.5, 0.87]], np.float32)
    bank = QueryBank(rows=rows, best=frozenset({"hub"}))
    assert names(without_hubs([hub, own], bank)) == ["own", "hub"]
    assert [h.score for h in without_hubs([hub, own], bank)] == [0.74, 0.75]
    other = QueryBank(rows=rows, best=frozenset({"third"}))
    assert names(without_hubs([hub, own], other)) == ["hub", "own"]
    assert without_hubs([], bank) == []


def test_fusion_adds_reciprocal_ranks() -> None:
    merged = fused([hit("a"), hit("b")], [hit("b"), hit("c")])
    assert names(merged) == ["b", "a", "c"]
    assert merged[0].score == pytest.approx(1 / 62 + 1 / 61, abs=1e-6)


def test_diversity_passes_over_copies_of_what_was_shown() -> None:
    hits = [hit("a", 0.9, 1, 0), hit("copy", 0.89, 1, 0), hit("b", 0.5, 0, 1)]
    assert names(diversified(hits, 2, 0.5)) == ["a", "b"]
    assert names(diversified(hits, 3, 1e-9)) == ["a", "copy", "b"]
    assert diversified([], 3, 0.5) == []


def test_near_duplicates_are_folded_into_the_best_of_them() -> None:
    hits = [hit("a", 0.9, 1, 0), hit("b", 0.8, 0, 1), hit("a2", 0.7, 1, 0), hit("b2", 0.6, 0, 1)]
    groups = grouped(hits, 5, 0.99)
    assert [(each.hit.id, each.duplicates) for each in groups] == [("a", ("a2",)), ("b", ("b2",))]
    assert [each.hit.id for each in grouped(hits, 1, 0.99)] == ["a"]
    assert grouped([], 1, 0.99) == []


def test_a_percentile_is_the_share_that_is_lower() -> None:
    assert percentiles([0.5, -1, 9], np.array([0.0, 0.4, 0.6, 1.0])) == [0.5, 0, 1]
    assert percentiles([1.0], np.empty(0)) == [0]
