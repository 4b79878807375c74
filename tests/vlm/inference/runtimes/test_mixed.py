"""Linear layers in bf16, on networks small enough to know what they must compute."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("openvino", reason="the extra openvino is not installed")

import openvino

from vlm.inference.runtimes.mixed import _input_means, _outputs, _rounded, mixed_tower

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


def test_inputs_are_rounded_to_the_nearest_bf16() -> None:
    """OpenVINO's own conversion is not: it kept a quarter of the numbers below."""
    ops = openvino.opset13
    start = ops.parameter([-1, WIDTH], openvino.Type.f32)
    product = ops.matmul(start, ops.constant(np.eye(WIDTH, dtype=np.float32)), False, True)
    product.set_friendly_name("fc")
    tower = openvino.Model([product], [start])
    inputs = drawn(0, 256, WIDTH) * 10.0 ** drawn(1, 256, 1)
    rounded = _rounded(openvino, tower, {"fc": np.zeros(WIDTH, np.float32)})
    nearest = torch.from_numpy(inputs).bfloat16().float().numpy()
    np.testing.assert_array_equal(_outputs(openvino, rounded, [inputs])[0], nearest)


def test_any_mean_gives_the_same_rows_and_the_true_one_the_nearest() -> None:
    tower = network(weights(1))
    inputs = 0.1 * drawn(5, 512, WIDTH) + 10 * drawn(6, 1, WIDTH)  # a narrow cone
    expected = _outputs(openvino, tower, [inputs])[0]
    ((name, mean),) = _input_means(openvino, tower, [inputs[:100], inputs[100:]]).items()
    np.testing.assert_allclose(mean, inputs.mean(axis=0), rtol=1e-5)

    def stray(shift: np.ndarray) -> float:
        found = _outputs(openvino, _rounded(openvino, tower, {name: shift}), [inputs])[0]
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
    rounded = _rounded(
        openvino, openvino.Model([product], [start]), {"proj": np.ones(WIDTH, np.float32)}
    )
    found = _outputs(openvino, rounded, [inputs])[0]
    np.testing.assert_allclose(found, inputs @ matrix, atol=0.2)
    assert np.abs(found - inputs @ matrix).max() > 0


def test_kinds_are_taken_while_rows_stay_as_near_as_allowed() -> None:
    layers = weights(2) | {"head.fc": 3 * drawn(9, WIDTH, WIDTH)}  # the head strays most
    tower = network(layers)
    batches = [drawn(3, 32, WIDTH), drawn(4, 7, WIDTH)]
    expected = _outputs(openvino, tower, batches)[0]
    everything, choices = mixed_tower(openvino, tower, batches, allowed=1.0)
    assert set(choices) == {"blocks.*.fc", "head.fc"}
    assert all(choice.chosen for choice in choices.values())
    assert choices["blocks.*.fc"].share == pytest.approx(2 / 3)
    assert choices["blocks.*.fc"].stray < choices["head.fc"].stray
    between = (choices["blocks.*.fc"].stray + choices["head.fc"].stray) / 2
    some, choices = mixed_tower(openvino, tower, batches, allowed=between)
    assert [kind for kind, choice in choices.items() if choice.chosen] == ["blocks.*.fc"]
    none, choices = mixed_tower(openvino, tower, batches, allowed=0.0)
    assert not any(choice.chosen for choice in choices.values())
    strays = [
        1 - float((_outputs(openvino, found, batches)[0] * expected).sum(axis=1).mean())
        for found in (none, some, everything)
    ]
    np.testing.assert_array_equal(_outputs(openvino, none, batches)[0], expected)
    assert strays[1] <= between
    assert strays[1] < strays[2]
