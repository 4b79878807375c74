"""Parameters spread over ranks, torch's FSDP2: each rank keeps a part of every tensor.

Source: the design of PyTorch FSDP (arXiv:2304.11277), in its per-parameter form, `fully_shard`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vlm.distributed.world import World

__all__ = [
    "Piece",
    "blocks_of",
    "is_sharded",
    "piece_of",
    "set_gradient_synchronisation",
    "shard",
    "whole",
]


def shard(
    model: nn.Module,
    world: World,
    *,
    dtype: torch.dtype | None,
    offload: bool,
    methods: Sequence[str],
    outputs: Sequence[type],
) -> None:
    """Spread the parameters of each of the model's blocks, and the rest as one more block.

    Args:
        model: Changed in place; its parameters become tensors of all ranks.
        world: The ranks; a process group must exist, even for one.
        dtype: In which blocks compute, and gather their parameters; gradients are added in
            float32. None leaves all in float32. The rest of the model is always float32.
        offload: Keep parameters and optimizer state in main memory. Without effect on a CPU.
        methods: Of the model and its blocks, which are called from outside beside `forward`.
        outputs: Dataclasses that models return.
    """
    for output in outputs:
        _make_tree(output)
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = CPUOffloadPolicy() if offload and world.device.type != "cpu" else OffloadPolicy()
    in_blocks = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32
    )
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=in_blocks, offload_policy=policy)
        _register(block, methods)
    fully_shard(model, mesh=mesh, offload_policy=policy, reshard_after_forward=False)
    _register(model, methods)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a model: outermost members of its lists that have parts themselves."""
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for member in child:
                if sum(1 for _ in _with_parameters(member)) > 1:
                    yield member
                else:
                    yield from blocks_of(member)
        else:
            yield from blocks_of(child)


def set_gradient_synchronisation(model: nn.Module, on: bool) -> None:
    """Whether the next backward of a sharded model adds up the gradients of all ranks."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(on)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """This rank's part of a tensor."""

    local: Tensor
    first: tuple[int, ...]
    """Where it begins in the whole, in each dimension."""
    shape: tuple[int, ...]
    """Of the whole."""


def piece_of(tensor: Tensor) -> Piece:
    """What this rank holds of a tensor: all of it, unless it is sharded."""
    if not isinstance(tensor, DTensor):
        return Piece(local=tensor, first=(0,) * tensor.ndim, shape=tuple(tensor.shape))
    _, first = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Piece(local=tensor.to_local(), first=tuple(first), shape=tuple(tensor.shape))


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds another part of a tensor, so that all must write theirs."""
    return isinstance(tensor, DTensor) and any(p.is_shard() for p in tensor.placements)


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all ranks, if it is sharded; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _with_parameters(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        if next(part.parameters(recurse=False), None) is not None:
            yield part


def _register(module: nn.Module, methods: Sequence[str]) -> None:
    for name in methods:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def _make_tree(output: type) -> None:
    """Let torch find the tensors in a dataclass, to know when their backward begins."""
    from torch.utils._pytree import SUPPORTED_NODES  # noqa: PLC0415 - asked here alone

    if output not in SUPPORTED_NODES:
        torch.export.register_dataclass(output)
