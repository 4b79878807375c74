"""Linear layers in bf16 where that costs the embeddings little, and everything else in fp32.

Processors multiply bf16 several times as fast as fp32. A network that is bf16 throughout also
rounds what its layers add up, and what tells one image from another is a small part of that. Here

1. only what a linear layer multiplies is rounded, its input and its weights, and its products;
   norms, attention, biases and the sums of residual blocks stay in fp32;
2. inputs are centred first: `W x + b = W (x - m) + (W m + b)` holds for every `m`, so with the mean
   of calibration inputs for `m` the rounding is relative to what differs between inputs, and other
   inputs than those of calibration cost accuracy, never correctness;
3. a kind of layer (its place in a block, over all blocks) is taken only while the embeddings stay
   near enough: each is tried alone, and those that stray least for what they compute are taken.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from vlm.inference.runtimes.parity import MIN_COSINE

__all__ = ["Choice", "mixed_tower"]

_ALLOWED: Final = 0.95 * (1 - MIN_COSINE)
"""Of mean cosine, on the calibration pairs: a little less than the gate allows on others."""
_LEAST_SHARE: Final = 0.01
"""Of a tower's weights; less is not worth trying."""
_SPLIT: Final = np.float32(2**16 + 1)
"""Dekker's factor: leaves the 8 leading bits of a float32's 24."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one kind of layer costs in bf16."""

    stray: float
    """1 - mean cosine of the embeddings, with these layers alone in bf16."""
    share: float
    """Of the weights of all linear layers of the tower."""
    chosen: bool


def mixed_tower(
    openvino: Any,
    tower: Any,
    batches: Sequence[np.ndarray],
    *,
    allowed: float = _ALLOWED,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[Any, dict[str, Choice]]:
    """Compute a tower's linear layers in bf16, as far as its rows stay near enough.

    Args:
        openvino: The module.
        tower: A network from one input to unit rows [batch dim]; stays as it is.
        batches: Calibration inputs.
        allowed: Largest 1 - mean cosine to the rows in fp32.
        report: Gets a line for each kind of layer that was tried.

    Returns:
        A network of the same input and output, and what was tried of each kind of layer.
    """
    expected = _outputs(openvino, tower, batches)[0]
    means = _input_means(openvino, tower, batches)
    kinds: dict[str, list[str]] = {}
    for name in means:
        kinds.setdefault(_kind(name), []).append(name)
    sizes = {_name(layer): _weights(layer).size for layer in _linear_layers(tower)}
    shares = {k: sum(sizes[n] for n in kinds[k]) / sum(sizes.values()) for k in kinds}

    def tried(chosen: Sequence[str]) -> tuple[Any, float]:
        layers = {name: means[name] for kind in chosen for name in kinds[kind]}
        network = _rounded(openvino, tower, layers)
        rows = _outputs(openvino, network, batches)[0]
        stray = 1 - float((rows.astype(np.float64) * expected).sum(axis=1).mean())
        return network, stray

    strays = {}
    for kind in kinds:
        if shares[kind] < _LEAST_SHARE:
            continue
        strays[kind] = tried([kind])[1]
        report(f"  {kind}: {shares[kind]:.0%} of the weights, 1 - cosine {strays[kind]:.1e}")
    taken: list[str] = []
    for kind in sorted(strays, key=lambda k: strays[k] / shares[k]):
        if sum(strays[k] for k in taken) + strays[kind] <= allowed:
            taken.append(kind)
    network, stray = tried(taken)
    while taken and not stray <= allowed:
        taken.pop()
        network, stray = tried(taken)
    share = sum(shares[k] for k in taken)
    report(f"  in bf16: {share:.0%} of the weights, mean cosine {1 - stray:.5f}")
    return network, {k: Choice(stray=strays[k], share=shares[k], chosen=k in taken) for k in strays}


def _kind(name: str) -> str:
    """A layer's place in its block, for the tracer's name of it, e.g. `blocks.*.mlp.fc1`."""
    place = re.sub(r"\.\d+\.", ".*.", name).removeprefix("__module.model.")
    return place.replace("aten::", "").removesuffix("/linear/MatMul")


def _linear_layers(tower: Any) -> list[Any]:
    """Products of something by constant weights [out in] or, not transposed, [in out]."""
    return [
        node
        for node in tower.get_ordered_ops()
        if node.get_type_name() == "MatMul"
        and not node.get_attributes()["transpose_a"]
        and node.input_value(1).get_node().get_type_name() == "Constant"
        and len(node.get_input_partial_shape(1)) == 2
    ]


def _name(layer: Any) -> str:
    name: str = layer.get_friendly_name()
    return name


def _weights(layer: Any) -> np.ndarray:
    """Weights [out in]."""
    weights = np.asarray(layer.input_value(1).get_node().data, np.float32)
    return weights if layer.get_attributes()["transpose_b"] else weights.T


def _input_means(openvino: Any, tower: Any, batches: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The mean input [in] of each linear layer, by its name."""
    ops = openvino.opset13
    probed = tower.clone()
    layers = _linear_layers(probed)
    for layer in layers:
        axes = np.arange(len(layer.get_input_partial_shape(0)) - 1)
        probed.add_outputs(ops.reduce_mean(layer.input_value(0), axes, False).output(0))
    sums = [np.zeros(_weights(layer).shape[1]) for layer in layers]
    for batch, (_, *means) in zip(batches, _each(openvino, probed, batches), strict=True):
        for total, mean in zip(sums, means, strict=True):
            total += len(batch) * mean
    count = sum(map(len, batches))
    return {
        _name(layer): (total / count).astype(np.float32)
        for layer, total in zip(layers, sums, strict=True)
    }


def _rounded(openvino: Any, tower: Any, means: dict[str, np.ndarray]) -> Any:
    """A copy of a tower in which these layers multiply centred inputs in bf16."""
    ops, bf16 = openvino.opset13, openvino.Type.bf16
    network = tower.clone()
    for layer in _linear_layers(network):
        mean = means.get(_name(layer))
        if mean is None:
            continue
        weights = _weights(layer)
        followers = list(layer.output(0).get_target_inputs())
        centred = ops.subtract(layer.input_value(0), mean)
        # OpenVINO's conversion does not round to nearest, so it gets what needs no rounding.
        scaled = ops.multiply(centred, _SPLIT)
        short = ops.subtract(scaled, ops.subtract(scaled, centred))
        nearest = torch.from_numpy(weights.copy()).bfloat16().float().numpy()
        product = ops.matmul(ops.convert(short, bf16), ops.constant(nearest, bf16), False, True)
        shift = (weights.astype(np.float64) @ mean.astype(np.float64)).astype(np.float32)
        full = ops.add(ops.convert(product, openvino.Type.f32), shift)
        for follower in followers:
            follower.replace_source_output(full.output(0))
    network.validate_nodes_and_infer_types()
    return network


def _outputs(openvino: Any, tower: Any, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each output over all batches, one after another."""
    found = _each(openvino, tower, batches)
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _each(openvino: Any, tower: Any, batches: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The outputs of each batch, of a network that is compiled once."""
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(tower, "CPU", options).create_infer_request()
    for batch in batches:
        results = request.infer({0: np.ascontiguousarray(batch)})
        yield [np.array(results[n]) for n in range(len(tower.outputs))]
