from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from serving.services.recall import (
    Measurement,
    Point,
    held_out_queries,
    is_out_of_date,
    measure,
    read_measurement,
    tune,
    written,
)
from serving.stores import Effort, EmbeddedStore, Hit, Item, Store
from tests.support import unit_rows


class Coarse:
    """A store whose index misses a known share: with p probes it knows p of the 16 first items."""

    is_indexed = True
    efforts: tuple[tuple[Effort, ...], ...] = tuple(
        tuple(Effort(probes, refine) for refine in (5, 20, 80)) for probes in (2, 4, 8, 16, 32)
    )

    def __init__(self, best: int) -> None:
        self.best = best
        self.tried: list[Effort | None] = []

    def count(self) -> int:
        return 100

    def search(self, vector: np.ndarray, limit: int, *, effort: Effort | None) -> list[Hit]:
        self.tried.append(effort)
        known = limit if effort is None else min(limit, effort.probes * self.best // 16)
        return [
            Hit(id=str(n), score=0, text=None, metadata={}, has_thumbnail=False)
            for n in range(known)
        ]


def coarse(best: int) -> Store:
    return cast(Store, Coarse(best))


QUERIES: dict[Any, np.ndarray] = {"text": unit_rows(3, 8).numpy(), "image": unit_rows(2, 8).numpy()}


def test_recall_is_the_share_of_what_exact_search_finds() -> None:
    found = measure(coarse(16), QUERIES, target=0.75)
    by_effort = {point.effort: point.recall for point in found.curve}
    assert by_effort[None] == {"text": 1, "image": 1}
    assert by_effort[Effort(4, 5)] == {"text": 0.4, "image": 0.4}
    assert by_effort[Effort(8, 5)] == {"text": 0.8, "image": 0.8}
    assert Effort(16, 20) not in by_effort  # 16 probes find everything: no need to look further
    assert found.queries == {"text": 3, "image": 2}
    assert found.meets_target
    assert min(found.chosen.recall.values()) >= 0.75


def test_an_index_that_never_reaches_the_target_is_not_used() -> None:
    found = measure(coarse(1), QUERIES, target=0.95)
    assert found.chosen.effort is None
    assert found.index_misses_target
    assert not measure(coarse(16), QUERIES, target=0.95).index_misses_target


def test_a_store_that_only_searches_exactly_is_never_measured_by_itself() -> None:
    flat = Coarse(16)
    flat.efforts, flat.is_indexed = (), False
    assert not is_out_of_date(cast(Store, flat), None, exact_below=10)
    assert is_out_of_date(coarse(16), None, exact_below=10)


def test_more_probes_are_not_tried_where_they_find_nothing_new() -> None:
    curve = measure(coarse(0), QUERIES, target=0.95).curve
    assert [point.effort.probes for point in curve if point.effort] == [2, 2, 2, 4, 4, 4]


def test_queries_are_captions_pictures_and_their_sums() -> None:
    rows = unit_rows(4, 8).float().numpy()
    sample = [
        Item(id="a", vector=rows[0], text="one"),
        Item(id="b", vector=rows[1], text=" "),
        Item(id="c", vector=rows[2], modality="text", text="words"),
        Item(id="d", vector=rows[3], text="two"),
    ]
    asked: list[Sequence[str]] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        asked.append(texts)
        return unit_rows(len(texts), 8, seed=1).float().numpy()

    queries = held_out_queries(sample, encode)
    assert asked == [["one", "two"]]
    assert {kind: len(found) for kind, found in queries.items()} == {
        "text": 2, "mixed": 2, "image": 4,
    }  # fmt: skip
    np.testing.assert_allclose(np.linalg.norm(queries["mixed"], axis=1), 1, atol=1e-6)
    assert held_out_queries([], encode) == {}


def test_a_measurement_is_kept_and_a_broken_one_is_measured_again() -> None:
    assert read_measurement(None) is None
    found = measure(coarse(16), QUERIES, target=0.5)
    assert read_measurement(written(found)) == found
    for broken in ("{", "[]", '{"items": 3}'):
        assert read_measurement(broken) is None


def test_a_collection_is_measured_when_it_grows_and_not_while_it_is_small(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path, fingerprint="f" * 64, dim=8)
    rows = unit_rows(300, 8).float().numpy()
    store.upsert([Item(id=f"{n:03d}", vector=row) for n, row in enumerate(rows[:200])])
    assert not is_out_of_date(store, None, exact_below=201)
    assert is_out_of_date(store, None, exact_below=200)
    queries: dict[Any, np.ndarray] = {"image": rows[::20]}
    known = tune(store, queries, target=0.9, known=None)
    assert store.is_indexed
    assert known.items == 200
    assert known.meets_target
    assert not is_out_of_date(store, known, exact_below=200)
    store.upsert([Item(id=f"{n:03d}", vector=rows[n]) for n in range(200, 260)])
    assert is_out_of_date(store, known, exact_below=200)
    assert tune(store, queries, target=0.9, known=known).items == 260


def test_the_fastest_effort_that_is_good_enough_is_chosen() -> None:
    def point(probes: int | None, recall: float, milliseconds: float) -> Point:
        effort = None if probes is None else Effort(probes, 5)
        return Point(effort=effort, recall={"text": recall}, milliseconds=milliseconds)

    poor = Measurement(
        items=1, target=0.9, queries={"text": 1}, curve=(), chosen=point(4, 0.8, 1), measured_at=0
    )
    assert not poor.meets_target
    with pytest.raises(AttributeError):
        poor.items = 2  # type: ignore[misc] # frozen
