import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.plan import Plan

sizes = st.integers(1, 40)


@given(num_samples=sizes, global_batch=sizes, seed=st.integers(0, 5))
def test_every_sample_comes_exactly_once_an_epoch(
    num_samples: int, global_batch: int, seed: int
) -> None:
    plan = Plan(num_samples=num_samples, global_batch=global_batch, seed=seed)
    line = np.concatenate([plan.rows(step) for step in range(3 * num_samples)])
    for epoch in line[: 3 * num_samples].reshape(3, num_samples):
        assert sorted(epoch) == list(range(num_samples))


@given(size=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 30))
def test_ranks_in_order_make_up_the_global_batch(size: int, step: int) -> None:
    plan = Plan(num_samples=31, global_batch=12, seed=3)
    parts = [plan.rank_rows(step, rank=rank, size=size) for rank in range(size)]
    assert np.concatenate(parts).tolist() == plan.rows(step).tolist()


def test_a_step_is_the_same_however_it_is_reached() -> None:
    first = Plan(num_samples=100, global_batch=7, seed=1)
    walked = [first.rows(step) for step in range(50)]
    jumped = Plan(num_samples=100, global_batch=7, seed=1).rows(49)
    assert walked[49].tolist() == jumped.tolist()


def test_epochs_and_seeds_differ_in_order() -> None:
    plan = Plan(num_samples=1000, global_batch=1000, seed=0)
    assert plan.rows(0).tolist() != plan.rows(1).tolist()
    assert (
        plan.rows(0).tolist() != Plan(num_samples=1000, global_batch=1000, seed=1).rows(0).tolist()
    )


def test_neighbours_in_storage_are_not_neighbours_in_training() -> None:
    rows = Plan(num_samples=10_000, global_batch=10_000, seed=0).rows(0)
    # A uniform shuffle keeps about one adjacent pair in ten thousand together.
    assert int((np.diff(rows) == 1).sum()) <= 8
    assert abs(np.corrcoef(rows, np.arange(10_000))[0, 1]) < 0.05


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="global batch of 8 does not divide over 3 ranks"):
        Plan(num_samples=10, global_batch=8, seed=0).rank_rows(0, rank=0, size=3)


def test_an_empty_dataset_has_no_plan() -> None:
    with pytest.raises(ValueError, match="got 0 samples"):
        Plan(num_samples=0, global_batch=8, seed=0)
