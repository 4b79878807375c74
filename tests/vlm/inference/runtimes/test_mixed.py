"""Linear layers in bf16, on networks small enough to know what they must compute."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("openvino", reason="the extra openvino is not installed")

import openvino

from vlm.inference.runtimes.mixed import (
    _input_means,
    _linear_layers,
    _name,
    _outputs,
    _parts,
    _rounded,
    _weights,
    mixed_tower,
)

WIDTH = 64


def network(weights: dict[str, np.ndarray]) -> Any:
    """Residual layers `x + W x` in a row, then unit rows."""
    ops = openvino.opset13
    start = ops.parameter([-1, WIDTH], openvino.Type.f32)
    state = start
    for name, matrix in weights.items():
        product = ops.matmul(state, ops.constant(matrix), False, True)
        product.set_friendly_name(name)
        state = ops.add(state, product)
    rows = ops.normalize_l2(state, np.array([1]), 1e-12, "add")
    return openvino.Model([rows], [start])


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights(count: int) -> dict[str, np.ndarray]:
    return {f"blocks.{n}.fc": 0.1 * drawn(n, WIDTH, WIDTH) for n in range(count)}


def in_bf16(tower: Any, means: dict[str, np.ndarray], *numbers: int) -> Any:
    """A tower whose layers, or these parts of them, multiply in bf16, weights at their nearest."""
    weights = {_name(layer): _weights(layer).copy() for layer in _linear_layers(tower)}
    nearest = {n: torch.from_numpy(m).bfloat16().float().numpy() for n, m in weights.items()}
    chosen = [
        part
        for name, matrix in weights.items()
        for number, part in enumerate(_parts(name, matrix.shape))
        if not numbers or number in numbers
    ]
    return _rounded(openvino, tower, means, nearest, chosen)


def test_inputs_are_rounded_to_the_nearest_bf16() -> None:
    """OpenVINO's own conversion is not: it kept a quarter of the numbers below."""
    ops = openvino.opset13
    start = ops.parameter([-1, WIDTH], openvino.Type.f32)
    product = ops.matmul(start, ops.constant(np.eye(WIDTH, dtype=np.float32)), False, True)
    product.set_friendly_name("fc")
    tower = openvino.Model([product], [start])
    inputs = drawn(0, 256, WIDTH) * 10.0 ** drawn(1, 256, 1)
    rounded = in_bf16(tower, {"fc": np.zeros(WIDTH, np.float32)})
    nearest = torch.from_numpy(inputs).bfloat16().float().numpy()
    np.testing.assert_array_equal(_outputs(openvino, rounded, [inputs])[0], nearest)


def test_any_mean_gives_the_same_rows_and_the_true_one_the_nearest() -> None:
    tower = network(weights(1))
    inputs = 0.1 * drawn(5, 512, WIDTH) + 10 * drawn(6, 1, WIDTH)  # a narrow cone
    expected = _outputs(openvino, tower, [inputs])[0]
    ((name, mean),) = _input_means(openvino, tower, [inputs[:100], inputs[100:]]).items()
    np.testing.assert_allclose(mean, inputs.mean(axis=0), rtol=1e-5)

    def stray(shift: np.ndarray) -> float:
        found = _outputs(openvino, in_bf16(tower, {name: shift}), [inputs])[0]
        return float(np.abs(found - expected).max())

    zero, other, true = stray(0 * mean), stray(mean + 3), stray(mean)
    assert max(zero, other) < 0.01
    assert true < zero / 10


def test_a_layer_that_is_not_transposed_is_the_same_layer() -> None:
    ops, matrix = openvino.opset13, drawn(1, WIDTH, 8)
    start = ops.parameter([-1, WIDTH], openvino.Type.f32)
    product = ops.matmul(start, ops.constant(matrix), False, False)
    product.set_friendly_name("proj")
    inputs = drawn(2, 4, WIDTH)
    tower = openvino.Model([product], [start])
    rounded = in_bf16(tower, {"proj": np.ones(WIDTH, np.float32)})
    found = _outputs(openvino, rounded, [inputs])[0]
    np.testing.assert_allclose(found, inputs @ matrix, atol=0.2)
    assert np.abs(found - inputs @ matrix).max() > 0


@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1), (0, 2), (0, 1, 2)])
def test_queries_keys_and_values_of_one_product_are_chosen_each_alone(
    numbers: tuple[int, ...],
) -> None:
    ops, matrix = openvino.opset13, drawn(1, 3 * WIDTH, WIDTH)
    start = ops.parameter([-1, WIDTH], openvino.Type.f32)
    product = ops.matmul(start, ops.constant(matrix), False, True)
    product.set_friendly_name("attn")
    inputs = drawn(2, 4, WIDTH)
    tower = in_bf16(
        openvino.Model([product], [start]), {"attn": np.ones(WIDTH, np.float32)}, *numbers
    )
    found = np.split(_outputs(openvino, tower, [inputs])[0], 3, axis=1)
    for number, (part, expected) in enumerate(
        zip(found, np.split(inputs @ matrix.T, 3, axis=1), strict=True)
    ):
        error = np.abs(part - expected).max()
        assert error < 0.3 if number in numbers else error < 1e-4
        assert bool(error > 1e-3) is (number in numbers)


def test_kinds_are_taken_while_rows_stay_as_near_as_allowed() -> None:
    layers = {name: 0.3 * matrix for name, matrix in weights(2).items()}
    layers["head.fc"] = 3 * drawn(9, WIDTH, WIDTH)  # strays most
    tower = network(layers)
    batches = [drawn(3, 32, WIDTH), drawn(4, 7, WIDTH), drawn(5, 99, WIDTH)]
    tried = batches[:2]
    expected = _outputs(openvino, tower, tried)[0]
    everything, choices = mixed_tower(openvino, tower, batches, allowed=1.0)
    assert set(choices) == {"blocks.*.fc", "head.fc"}
    assert all(choice.chosen == 1 for choice in choices.values())
    assert choices["blocks.*.fc"].share == pytest.approx(2 / 3)
    assert choices["blocks.*.fc"].stray < choices["head.fc"].stray
    between = (choices["blocks.*.fc"].stray + choices["head.fc"].stray) / 2
    some, choices = mixed_tower(openvino, tower, batches, allowed=between)
    assert {kind: choice.chosen for kind, choice in choices.items()} == {
        "blocks.*.fc": 1,
        "head.fc": 0,
    }
    little = 0.6 * choices["blocks.*.fc"].stray
    half, choices = mixed_tower(openvino, tower, batches, allowed=little)
    assert {kind: choice.chosen for kind, choice in choices.items()} == {
        "blocks.*.fc": 0.5,  # the last of two blocks
        "head.fc": 0,
    }
    none, choices = mixed_tower(openvino, tower, batches, allowed=0.0)
    assert not any(choice.chosen for choice in choices.values())
    strays = [
        1 - float((_outputs(openvino, found, tried)[0] * expected).sum(axis=1).mean())
        for found in (none, half, some, everything)
    ]
    np.testing.assert_array_equal(_outputs(openvino, none, tried)[0], expected)
    assert strays == sorted(strays)
    assert strays[1] <= little
    assert strays[2] <= between
