"""Lion's step as one CUDA kernel: each number is read and written once."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

__all__ = ["fused_lion", "fuses"]

_BLOCK = 1024
_WORTH_A_LAUNCH = 2**16
"""Fewer numbers than these go faster many tensors at a time."""


def fuses(parameter: Tensor, gradient: Tensor, momentum: Tensor) -> bool:
    """Whether the kernel can take these: large, on CUDA, and laid out alike without holes."""
    layouts = {tensor.stride() for tensor in (parameter, gradient, momentum)}
    dense = parameter.is_contiguous() or (
        parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    )
    return (
        parameter.is_cuda
        and parameter.numel() >= _WORTH_A_LAUNCH
        and dense
        and len(layouts) == 1
        and importlib.util.find_spec("triton") is not None
    )


def fused_lion(
    parameter: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """One step in place, computed in float32 whatever the tensors' types; see `vlm.optim.Lion`."""
    kernel = _kernel()
    count = parameter.numel()
    kernel[((count + _BLOCK - 1) // _BLOCK,)](
        parameter,
        gradient,
        momentum,
        count,
        lr,
        1 - lr * weight_decay,
        1 - betas[0],
        1 - betas[1],
        BLOCK=_BLOCK,
    )


_compiled: list[Any] = []


def _kernel() -> Any:
    """The kernel; triton comes with CUDA builds of torch alone, so it is imported at first use."""
    if not _compiled:
        from vlm.optim.lion_kernel import lion_kernel  # noqa: PLC0415 - imports triton

        _compiled.append(lion_kernel)
    return _compiled[0]
