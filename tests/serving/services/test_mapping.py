import numpy as np
import pytest

from serving.services.mapping import principal_axes


def test_points_on_a_line_keep_their_distances_on_the_first_axis() -> None:
    direction = np.array([0.6, 0.0, -0.8])
    places, explained = principal_axes(np.outer([0.0, 1.0, 5.0], direction) + 7)
    assert np.abs(places[:, 1]).max() < 1e-9
    # The largest part of the direction is negative, and the axis points the other way.
    assert places[:, 0] - places[0, 0] == pytest.approx([0.0, -1.0, -5.0])
    assert explained == pytest.approx(1)


def test_the_axes_do_not_depend_on_the_order_of_the_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 6))
    places, _ = principal_axes(rows)
    np.testing.assert_allclose(principal_axes(rows[::-1])[0], places[::-1], atol=1e-9)


def test_one_row_or_one_dimension_is_drawn_too() -> None:
    alone, explained = principal_axes(np.ones((1, 3)))
    assert (alone.tolist(), explained) == ([[0, 0]], 0)
    places, explained = principal_axes(np.array([[0.0], [2.0]]))
    assert places.tolist() == [[-1, 0], [1, 0]]
    assert explained == pytest.approx(1)
