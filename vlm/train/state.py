"""What an engine has learnt, by the names of parameters: the same for every engine.

So a checkpoint of one engine and number of ranks continues on another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.distributed import Piece
from vlm.errors import CheckpointError
from vlm.train.shards import ShardReader

__all__ = [
    "EngineState",
    "SavedState",
    "begin_optimizer",
    "check_names",
    "fill_number",
    "fill_optimizer",
    "fill_weights",
    "optimizer_state",
]


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """What this rank is to write, so that all ranks together write everything once."""

    weights: dict[str, Piece]
    optimizer: dict[str, Piece]
    """By `parameter/key`, e.g. `text.token_embedding.weight/exp_avg`."""
    numbers: dict[str, float]
    """Counters of the optimizer and the like; every rank has all."""


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A checkpoint as an engine reads it."""

    weights: ShardReader
    optimizer: ShardReader
    numbers: dict[str, float]


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors and numbers that an optimizer keeps of each parameter, by `parameter/key`."""
    tensors, numbers = {}, {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.ndim:
                tensors[f"{name}/{key}"] = value
            elif value is not None:
                numbers[f"{name}/{key}"] = float(value)
    return tensors, numbers


def fill_weights(state: Mapping[str, Tensor], saved: ShardReader) -> None:
    """Copy saved tensors into those of a model, whole or sharded.

    Raises:
        CheckpointError: If they are not those of this model.
    """
    check_names(state, saved)
    for name, tensor in state.items():
        saved.fill(name, tensor)


def check_names(state: Mapping[str, Tensor], saved: ShardReader) -> None:
    """Raise CheckpointError unless the saved tensors have the names of a model's."""
    unknown = sorted(set(saved.shapes) ^ set(state))
    if unknown:
        message = f"weights do not fit the configured model: {', '.join(unknown[:5])}"
        raise CheckpointError(message)


def fill_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: ShardReader,
    numbers: Mapping[str, float],
) -> None:
    """Copy a saved state into an optimizer.

    Raises:
        CheckpointError: If something is missing or of another shape.
    """
    begin_optimizer(optimizer)
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        keys = [f"{name}/{key}" for key in state]
        if keys and not any(key in saved.shapes or key in numbers for key in keys):
            del optimizer.state[parameter]  # it never had a gradient
            continue
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                saved.fill(f"{name}/{key}", value)
            elif value is not None:
                fill_number(state, key, f"{name}/{key}", numbers)


def fill_number(
    state: dict[str, Any], key: str, full_key: str, numbers: Mapping[str, float]
) -> None:
    """Set a counter of an optimizer, whatever it is kept in.

    Raises:
        CheckpointError: If it was not saved.
    """
    if full_key not in numbers:
        message = f"the optimizer's {full_key} is not in the checkpoint; remove it"
        raise CheckpointError(message)
    if isinstance(state[key], Tensor):
        state[key].fill_(numbers[full_key])
    else:
        state[key] = type(state[key])(numbers[full_key])


def begin_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer make its state, by a step that moves nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
