from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import only
from vlm.data.mixture import MixturePlan, build_mixture
from vlm.data.plan import Plan


def mixture(
    sizes: Sequence[int],
    weights: Sequence[float],
    *,
    repeats: Sequence[bool] | None = None,
    curriculum: Sequence[tuple[int, Sequence[float]]] = (),
    global_batch: int = 12,
) -> MixturePlan:
    plans = [
        Plan(num_samples=size, global_batch=4, seed=number, run_length=3)
        for number, size in enumerate(sizes)
    ]
    return build_mixture(
        plans,
        weights=[float(weight) for weight in weights],
        repeats=repeats or [True] * len(sizes),
        curriculum=[(step, [float(w) for w in values]) for step, values in curriculum],
        global_batch=global_batch,
        seed=5,
    )


def line(plan: MixturePlan, steps: int, *, size: int = 1) -> list[tuple[int, int]]:
    """(source, row) of every position, put together from the ranks' parts."""
    visits = []
    for step in range(steps):
        for rank in range(size):
            sources, rows = plan.rank_rows(step, rank=rank, size=size)
            visits += list(zip(sources.tolist(), rows.tolist(), strict=True))
    return visits


weights = st.lists(st.floats(0.01, 10), min_size=2, max_size=4)


@settings(deadline=None, max_examples=30)
@given(weights=weights, size=st.sampled_from([2, 3, 4, 6]), start=st.integers(0, 10**9))
def test_the_mixture_is_the_same_for_any_number_of_ranks_anywhere(
    weights: list[float], size: int, start: int
) -> None:
    plan = mixture([50, 7, 90, 11][: len(weights)], weights)
    whole = plan.rank_rows(start, rank=0, size=1)
    parts = [plan.rank_rows(start, rank=rank, size=size) for rank in range(size)]
    for axis in (0, 1):
        assert np.concatenate([part[axis] for part in parts]).tolist() == whole[axis].tolist()


@settings(deadline=None, max_examples=10)  # a second each
@given(weights=weights, steps=st.integers(1, 40))
def test_each_source_gives_its_samples_in_its_own_order_and_the_counts_are_told(
    weights: list[float], steps: int
) -> None:
    plan = mixture([50, 7, 90, 11][: len(weights)], weights)
    visits = line(plan, steps)
    for number, own in enumerate(plan.plans):
        rows = [row for source, row in visits if source == number]
        assert plan.counts(steps)[number] == len(rows)
        assert rows == own.rows_at(np.arange(len(rows))).tolist() if rows else True


@settings(deadline=None, max_examples=10)  # a second each
@given(weights=weights, step=st.integers(0, 10**8))
def test_every_batch_holds_the_sources_nearly_in_proportion(
    weights: list[float], step: int
) -> None:
    plan = mixture([50, 7, 90, 11][: len(weights)], weights, global_batch=1024)
    sources, _ = plan.rank_rows(step, rank=0, size=1)
    expected = 1024 * np.array(weights) / sum(weights)
    found = np.bincount(sources, minlength=len(weights))
    # The discrepancy of the golden sequence grows with the logarithm alone; chance would give
    # deviations of 16 and outliers beyond 60.
    assert np.abs(found - expected).max() < 8


def test_proportions_are_exact_in_the_long_run() -> None:
    plan = mixture([10, 10], [3, 1], global_batch=2**12)
    assert plan.counts(2**20) == (3 * 2**30, 2**30)


def test_a_source_that_does_not_repeat_comes_once_and_then_the_others_share_its_part() -> None:
    plan = mixture([1000, 30, 2000], [1, 1, 2], repeats=[True, False, True])
    visits = line(plan, 100)
    assert sorted(row for source, row in visits if source == 1) == list(range(30))
    last = max(place for place, (source, _) in enumerate(visits) if source == 1)
    assert abs(last - 120) < 10  # a quarter of the positions until then
    rest = [source for source, _ in visits[last + 1 :]]
    assert rest.count(2) / len(rest) == pytest.approx(2 / 3, abs=0.01)


def test_sources_that_all_end_give_every_sample_once_and_then_nothing() -> None:
    plan = mixture([25, 30, 17], [1, 1, 2], repeats=[False] * 3)
    assert plan.end == 72
    visits = line(plan, 6)
    assert sorted(visits) == [
        (n, row) for n, size in enumerate([25, 30, 17]) for row in range(size)
    ]
    with pytest.raises(ValueError, match="the sources end at position 72, 84 was asked for"):
        plan.rank_rows(6, rank=0, size=1)


def test_weights_change_at_the_step_of_the_curriculum_and_no_sample_is_lost() -> None:
    plan = mixture([500, 500], [1, 0], curriculum=[(10, [1, 3]), (20, [0, 1])])
    shares = [
        float(np.mean(plan.rank_rows(step, rank=0, size=1)[0])) for step in (0, 9, 10, 19, 20, 29)
    ]
    assert shares[:2] == [0, 0]
    assert shares[2:4] == pytest.approx([0.75, 0.75], abs=0.1)
    assert shares[4:] == [1, 1]
    for number in (0, 1):
        rows = [row for source, row in line(plan, 30) if source == number]
        assert len(set(rows)) == len(rows)


def test_a_source_used_up_in_one_stage_stays_away_in_the_next() -> None:
    plan = mixture([20, 500], [1, 1], repeats=[False, True], curriculum=[(30, [5, 1])])
    assert [source for source, _ in line(plan, 60)].count(0) == 20


def test_a_weight_below_the_resolution_never_comes() -> None:
    plan = mixture([20, 500], [1e-12, 1], repeats=[False, True])
    assert plan.counts(10**6)[0] == 0


@settings(deadline=None)
@given(step=st.integers(0, 1000))
def test_one_source_alone_is_its_plan(step: int) -> None:
    plan = Plan(num_samples=31, global_batch=12, seed=3, run_length=4)
    sources, rows = only(plan).rank_rows(step, rank=0, size=1)
    assert sources.tolist() == [0] * 12
    assert rows.tolist() == plan.rows(step).tolist()


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="global batch of 12 does not divide over 5 ranks"):
        mixture([10, 10], [1, 1]).rank_rows(0, rank=0, size=5)
