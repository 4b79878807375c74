import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.plan import Plan, usual_run_length

sizes = st.integers(1, 40)


@settings(deadline=None)
@given(num_samples=sizes, global_batch=sizes, seed=st.integers(0, 5), run_length=sizes)
def test_every_sample_comes_exactly_once_an_epoch(
    num_samples: int, global_batch: int, seed: int, run_length: int
) -> None:
    plan = Plan(
        num_samples=num_samples, global_batch=global_batch, seed=seed, run_length=run_length
    )
    steps = range(-(-3 * num_samples // global_batch))
    line = np.concatenate([plan.rows(step) for step in steps])
    for epoch in line[: 3 * num_samples].reshape(3, num_samples):
        assert sorted(epoch) == list(range(num_samples))


@given(size=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 30), run_length=sizes)
def test_ranks_in_order_make_up_the_global_batch(size: int, step: int, run_length: int) -> None:
    plan = Plan(num_samples=31, global_batch=12, seed=3, run_length=run_length)
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


def test_each_run_of_neighbours_is_read_whole_by_one_rank() -> None:
    # 3 tiles of 16 steps an epoch, and a global batch that divides the epoch.
    plan = Plan(num_samples=3 * 16 * 24, global_batch=24, seed=5, run_length=16)
    owners: dict[int, set[int]] = {}
    for step in range(3 * 16):
        for rank in range(4):
            for row in plan.rank_rows(step, rank=rank, size=4):
                owners.setdefault(int(row) // 16, set()).add(rank)
    assert len(owners) == 3 * 24
    assert all(len(ranks) == 1 for ranks in owners.values())


def test_a_batch_mixes_as_many_runs_as_it_has_rows() -> None:
    plan = Plan(num_samples=64_000, global_batch=50, seed=0, run_length=64)
    for step in (0, 63, 64, 700):
        assert len(np.unique(plan.rows(step) // 64)) == 50


@pytest.mark.parametrize("run_length", [1, 64])
def test_an_epoch_is_mixed_as_well_as_a_uniform_shuffle(run_length: int) -> None:
    count = 64_000
    plan = Plan(num_samples=count, global_batch=1000, seed=2, run_length=run_length)
    line = np.concatenate([plan.rows(step) for step in range(count // 1000)])
    uniform = np.random.default_rng(0).permutation(count)
    for rows in (line, uniform):
        # Neither the place in the epoch nor the row before tells the row.
        assert abs(np.corrcoef(rows, np.arange(count))[0, 1]) < 0.02
        assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 0.02
        # Ascending stretches have a mean length of 2. With runs there is one order of 1,000 runs
        # behind all 64 steps, so the deviation is that of 1,000 rows, not of 64,000.
        assert count / (1 + int((np.diff(rows) < 0).sum())) == pytest.approx(2, abs=0.1)
        # Each batch is spread over the dataset: the mean of its 1,000 rows is near the middle.
        means = rows.reshape(-1, 1000).mean(axis=1) / count
        assert float(np.abs(means - 0.5).max()) < 0.05


def test_ten_billion_samples_are_planned_without_a_list_of_them() -> None:
    plan = Plan(num_samples=10**10, global_batch=32_768, seed=0, run_length=64)
    rows = plan.rank_rows(200_000, rank=4095, size=4096)
    assert rows.tolist() == plan.rows(200_000)[-8:].tolist()


def test_long_runs_are_for_large_datasets() -> None:
    assert usual_run_length(1_000_000) == 1
    assert usual_run_length(1_000_001) == 64


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="global batch of 8 does not divide over 3 ranks"):
        Plan(num_samples=10, global_batch=8, seed=0).rank_rows(0, rank=0, size=3)


def test_an_empty_dataset_has_no_plan() -> None:
    with pytest.raises(ValueError, match="got 0 samples"):
        Plan(num_samples=0, global_batch=8, seed=0)
