"""Cyclic consistency against the sums over pairs that it never forms."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support import unit_rows
from tests.vlm.losses.compare import assert_same, features
from vlm.losses import cyclic_consistency


def in_modal(image: Tensor, text: Tensor) -> Tensor:
    return (image @ image.T - text @ text.T).square().sum() / len(image)


def cross_modal(image: Tensor, text: Tensor) -> Tensor:
    cosines = image @ text.T
    return (cosines - cosines.T).square().sum() / len(image)


@pytest.mark.parametrize("rows", [1, 4, 23])
def test_both_parts_equal_their_sums_over_pairs_in_value_and_gradient(rows: int) -> None:
    given = features(rows)
    assert_same(lambda i, t: cyclic_consistency(i, t)[0], in_modal, *given)
    assert_same(lambda i, t: cyclic_consistency(i, t)[1], cross_modal, *given)


def test_a_rotation_between_the_modalities_keeps_in_modal_distances() -> None:
    image = unit_rows(23, 6)
    rotation, _ = torch.linalg.qr(unit_rows(6, 6, seed=1))
    found, cross = cyclic_consistency(image, image @ rotation)
    assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)
    assert float(cross) > 0.1


def test_equal_modalities_are_consistent() -> None:
    image = unit_rows(23, 6).float()
    assert [float(part) for part in cyclic_consistency(image, image)] == [0.0, 0.0]


def test_float32_is_exact_to_a_millionth_of_the_sum() -> None:
    image, text = unit_rows(512, 32), unit_rows(512, 32, seed=1)
    for mix in (0.0, 0.9, 0.999):
        near = torch.nn.functional.normalize(mix * image + (1 - mix) * text, dim=1)
        exact = torch.stack(cyclic_consistency(image, near))
        found = torch.stack(cyclic_consistency(image.float(), near.float()))
        # What is left is the rounding of the rows themselves, the larger the nearer they are.
        tolerance = 2e-6 * float(exact.sum()) / max(1 - mix, 1e-3)
        assert_close(found.double(), exact, rtol=0, atol=tolerance)
