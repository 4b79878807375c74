"""Linear layers in bf16 where that costs the embeddings little, and everything else in fp32.

Processors multiply bf16 several times as fast as fp32. A network that is bf16 throughout also
rounds what its layers add up, and what tells one image from another is a small part of that. Here

1. only what a linear layer multiplies is rounded, its input and its weights, and its products;
   norms, attention, biases and the sums of residual blocks stay in fp32;
2. inputs are centred first: `W x + b = W (x - m) + (W m + b)` holds for every `m`, so with the mean
   of calibration inputs for `m` the rounding is relative to what differs between inputs, and other
   inputs than those of calibration cost accuracy, never correctness;
3. weights are rounded to whichever side keeps a layer's products on calibration inputs, see
   `rounding.py`, which halves what their rounding costs and more;
4. a kind of layer (its place in a block, over all blocks) is taken only while the embeddings stay
   near enough: each is tried alone, on other inputs than weights were rounded for, and those that
   stray least for what they compute are taken, of the last that fits as many blocks as do. Queries,
   keys and values that one product makes together are three kinds.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from vlm.inference.runtimes.parity import MIN_COSINE
from vlm.inference.runtimes.rounding import round_weights

__all__ = ["Choice", "mixed_tower"]

_ALLOWED: Final = 0.95 * (1 - MIN_COSINE)
"""Of mean cosine, on the calibration pairs: a little less than the gate allows on others."""
_LEAST_SHARE: Final = 0.01
"""Of a tower's weights; less is not worth trying."""
_TRIED_BATCHES: Final = 12
"""Enough for a mean cosine; each kind of layer is tried on them."""
_SPLIT: Final = np.float32(2**16 + 1)
"""Dekker's factor: leaves the 8 leading bits of a float32's 24."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one kind of layer costs in bf16."""

    stray: float
    """1 - mean cosine of the embeddings, with these layers alone in bf16."""
    share: float
    """Of the weights of all linear layers of the tower."""
    chosen: float
    """Of its layers, the part that is in bf16, 0 to 1: those of the last blocks."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows of a linear layer's weights: all, or the queries', keys' or values'."""

    layer: str
    start: int
    stop: int
    size: int
    """How many weights."""
    kind: str


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
        batches: Calibration inputs. The first half, 12 at most, is tried on; weights are rounded
            for the rest.
        allowed: Largest 1 - mean cosine to the rows in fp32.
        report: Gets a line for each kind of layer that was tried.

    Returns:
        A network of the same input and output, and what was tried of each kind of layer.
    """
    half = min(_TRIED_BATCHES, (len(batches) + 1) // 2)
    tried, fitted = batches[:half], batches[half:] or batches
    expected = _outputs(openvino, tower, tried)[0]
    weights = {_name(layer): _weights(layer) for layer in _linear_layers(tower)}
    means = _input_means(openvino, tower, fitted)
    total = sum(matrix.size for matrix in weights.values())
    kinds, shares = _worth_trying(weights, total)
    moments = _input_moments(openvino, tower, fitted, means)
    rounded = {
        name: round_weights(torch.from_numpy(weights[name].copy()), moments[name]).numpy()
        for name in {part.layer for parts in kinds.values() for part in parts}
    }

    def stray_of(chosen: Collection[_Part]) -> tuple[Any, float]:
        network = _rounded(openvino, tower, means, rounded, chosen)
        rows = _outputs(openvino, network, tried)[0]
        return network, 1 - float((rows.astype(np.float64) * expected).sum(axis=1).mean())

    strays = {}
    for kind in kinds:
        strays[kind] = stray_of(kinds[kind])[1]
        report(f"  {kind}: {shares[kind]:.0%} of the weights, 1 - cosine {strays[kind]:.1e}")
    taken = _cheapest(strays, shares, {k: len(parts) for k, parts in kinds.items()}, allowed)
    while True:
        chosen = [part for kind, count in taken.items() for part in kinds[kind][-count:]]
        network, stray = stray_of(chosen)
        if not taken or stray <= allowed:
            break
        taken.popitem()
    share = sum(part.size for part in chosen) / total
    report(f"  in bf16: {share:.0%} of the weights, mean cosine {1 - stray:.5f}")
    return network, {
        kind: Choice(
            stray=strays[kind], share=shares[kind], chosen=taken.get(kind, 0) / len(kinds[kind])
        )
        for kind in strays
    }


def _cheapest(
    strays: Mapping[str, float],
    shares: Mapping[str, float],
    counts: Mapping[str, int],
    allowed: float,
) -> dict[str, int]:
    """How many layers of each kind to take, those first that stray least for what they compute.

    Small strays add up, over kinds and over the layers of one.
    """
    taken: dict[str, int] = {}
    left = allowed
    for kind in sorted(strays, key=lambda k: strays[k] / shares[k]):
        part = 1.0 if strays[kind] <= left else max(left, 0.0) / strays[kind]
        if count := int(part * counts[kind]):
            taken[kind] = count
            left -= strays[kind] * count / counts[kind]
    return taken


def _worth_trying(
    weights: Mapping[str, np.ndarray], total: int
) -> tuple[dict[str, list[_Part]], dict[str, float]]:
    """The parts of each kind that holds enough of the weights, and how much it holds."""
    kinds: dict[str, list[_Part]] = {}
    for name, matrix in weights.items():
        for part in _parts(name, matrix.shape):
            kinds.setdefault(part.kind, []).append(part)
    shares = {kind: sum(part.size for part in parts) / total for kind, parts in kinds.items()}
    enough = {kind: share for kind, share in shares.items() if share >= _LEAST_SHARE}
    return {kind: kinds[kind] for kind in enough}, enough


def _parts(name: str, shape: tuple[int, ...]) -> list[_Part]:
    """Three where a layer is thrice as high as it is wide: queries, keys and values."""
    height, width = shape
    count = 3 if height == 3 * width else 1
    return [
        _Part(
            layer=name,
            start=number * height // count,
            stop=(number + 1) * height // count,
            size=height // count * width,
            kind=_kind(name) + (f"[{number}]" if count > 1 else ""),
        )
        for number in range(count)
    ]


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


def _input_moments(
    openvino: Any, tower: Any, batches: Sequence[np.ndarray], means: Mapping[str, np.ndarray]
) -> dict[str, Tensor]:
    """Sums of products [in in] of each linear layer's centred inputs, by its name."""
    probed = tower.clone()
    by_source: dict[tuple[str, int], list[str]] = {}
    for layer in _linear_layers(probed):
        source = layer.input_value(0)
        key = (source.get_node().get_friendly_name(), source.get_index())
        if key not in by_source:
            probed.add_outputs(source)
        by_source.setdefault(key, []).append(_name(layer))
    sharing = list(by_source.values())
    sums = [torch.zeros(2 * means[names[0]].shape) for names in sharing]
    for _, *inputs in _each(openvino, probed, batches):
        for total, names, rows in zip(sums, sharing, inputs, strict=True):
            centred = torch.from_numpy(rows.reshape(-1, rows.shape[-1]) - means[names[0]])
            total += centred.T @ centred
    return {name: total for names, total in zip(sharing, sums, strict=True) for name in names}


def _rounded(
    openvino: Any,
    tower: Any,
    means: Mapping[str, np.ndarray],
    rounded: Mapping[str, np.ndarray],
    chosen: Collection[_Part],
) -> Any:
    """A copy of a tower whose chosen parts multiply centred inputs by rounded weights in bf16."""
    ops, bf16 = openvino.opset13, openvino.Type.bf16
    network = tower.clone()
    for layer in _linear_layers(network):
        name, weights, source = _name(layer), _weights(layer), layer.input_value(0)
        parts = _parts(name, weights.shape)
        if not any(part in chosen for part in parts):
            continue
        followers = list(layer.output(0).get_target_inputs())
        centred = ops.subtract(source, means[name])
        # OpenVINO's conversion does not round to nearest, so it gets what needs no rounding.
        scaled = ops.multiply(centred, _SPLIT)
        short = ops.convert(ops.subtract(scaled, ops.subtract(scaled, centred)), bf16)
        columns = []
        for is_chosen, neighbours in itertools.groupby(parts, key=lambda part: part in chosen):
            group = list(neighbours)
            place = slice(group[0].start, group[-1].stop)
            rows = weights[place]
            if not is_chosen:
                columns.append(ops.matmul(source, ops.constant(rows.copy()), False, True))
                continue
            nearby = ops.constant(rounded[name][place].copy(), bf16)
            product = ops.matmul(short, nearby, False, True)
            shift = (rows.astype(np.float64) @ means[name].astype(np.float64)).astype(np.float32)
            columns.append(ops.add(ops.convert(product, openvino.Type.f32), shift))
        full = columns[0] if len(columns) == 1 else ops.concat(columns, -1)
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
