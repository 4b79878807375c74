"""Weights rounded to bf16 against those rounded to nearest."""

import pytest
import torch

from vlm.inference.runtimes.rounding import round_weights

OUT, IN = 24, 300  # more than two blocks of columns


def weights() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


def correlated(rows: int) -> torch.Tensor:
    """Inputs of which 20 directions hold nearly all."""
    generator = torch.Generator().manual_seed(2)
    few = torch.randn(rows, 20, generator=generator) @ torch.randn(20, IN, generator=generator)
    return few + 0.05 * torch.randn(rows, IN, generator=generator)


@pytest.mark.parametrize("moments", [torch.eye(IN), torch.zeros(IN, IN)], ids=["white", "none"])
def test_of_inputs_that_share_nothing_each_weight_goes_to_its_nearest(
    moments: torch.Tensor,
) -> None:
    assert torch.equal(round_weights(weights(), moments), weights().bfloat16().float())


def test_products_with_correlated_inputs_stay_nearer_on_other_inputs_too() -> None:
    inputs, others = correlated(600).split(300)
    rounded = round_weights(weights(), inputs.T @ inputs)
    assert torch.equal(rounded, rounded.bfloat16().float())

    def error(matrix: torch.Tensor) -> float:
        return float((others @ (matrix - weights()).T).square().mean().sqrt())

    assert error(rounded) < error(weights().bfloat16().float()) / 3


def test_the_weights_given_stay_as_they_are() -> None:
    given = weights()
    round_weights(given, torch.eye(IN))
    assert torch.equal(given, weights())
