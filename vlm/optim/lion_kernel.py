"""The kernel of `lion_triton`; importing this needs triton."""

from typing import Any

import triton
import triton.language as tl

__all__ = ["lion_kernel"]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore] # triton has no types, nor is it everywhere
def lion_kernel(  # noqa: D103 - triton compiles the body, the sentence is above
    parameter_pointer: Any,
    gradient_pointer: Any,
    momentum_pointer: Any,
    count: Any,
    lr: Any,
    kept: Any,
    one_minus_beta1: Any,
    one_minus_beta2: Any,
    BLOCK: tl.constexpr,  # noqa: N803 - triton's constants are spelled so
) -> None:
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    parameter = tl.load(parameter_pointer + offsets, mask=inside).to(tl.float32)
    gradient = tl.load(gradient_pointer + offsets, mask=inside).to(tl.float32)
    momentum = tl.load(momentum_pointer + offsets, mask=inside).to(tl.float32)
    towards = gradient - momentum
    direction = momentum + one_minus_beta1 * towards
    sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, 0.0))
    tl.store(parameter_pointer + offsets, parameter * kept - lr * sign, mask=inside)
    tl.store(momentum_pointer + offsets, momentum + one_minus_beta2 * towards, mask=inside)
