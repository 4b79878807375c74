import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.permute import mix, permute


@given(domain=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_every_index_of_any_domain_is_reached_once(domain: int, key: int) -> None:
    assert sorted(permute(np.arange(domain), domain, key)) == list(range(domain))


def test_one_index_alone_goes_where_it_goes_among_others() -> None:
    together = permute(np.arange(1000), 1000, 7)
    assert permute(np.array([123]), 1000, 7)[0] == together[123]


def test_keys_may_differ_from_index_to_index() -> None:
    index = np.array([5, 5, 6])
    found = permute(index, 50, np.array([1, 2, 1], dtype=np.uint64))
    expected = [int(permute(index[i : i + 1], 50, key)[0]) for i, key in enumerate((1, 2, 1))]
    assert found.tolist() == expected


@pytest.mark.parametrize("domain", [3, 5, 8, 17])
def test_every_index_lands_everywhere_equally_often(domain: int) -> None:
    rounds = 4000
    keys = np.repeat(np.array([mix(n) for n in range(rounds)], dtype=np.uint64), domain)
    index = np.tile(np.arange(domain), rounds)
    pairs = index * domain + permute(index, domain, keys)
    counts = np.bincount(pairs, minlength=domain * domain)
    expected = rounds / domain
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # Mean and deviation of a chi-square of (domain - 1)^2 degrees of freedom.
    degrees = (domain - 1) ** 2
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


def test_ten_billion_indices_need_no_memory_for_them() -> None:
    domain = 10**10
    found = permute(np.arange(domain - 4096, domain), domain, 1)
    assert len(np.unique(found)) == 4096
    assert found.min() >= 0
    assert found.max() < domain
    assert abs(float(found.mean()) / domain - 0.5) < 0.03
