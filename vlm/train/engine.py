"""How a step is carried out: one process, or data parallel over ranks.

`Engine` is the protocol that the loop speaks; DeepSpeed has its own file.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlm.distributed import World
from vlm.models import Model, clamp_logit_scale
from vlm.train.config import TorchEngineConfig
from vlm.train.fp8 import convert_to_fp8
from vlm.train.shards import own_pieces
from vlm.train.state import EngineState, SavedState, fill_optimizer, fill_weights, optimizer_state
from vlm.types import DualEncoderOutput

__all__ = ["Engine", "TorchEngine", "computes_bf16"]


@runtime_checkable
class Engine(Protocol):
    """Forward, backward and step of one model on all ranks."""

    model: Model
    """The model itself, whatever wraps it."""
    optimizer: torch.optim.Optimizer
    description: str
    """Device, ranks and precision, for people."""
    scales_loss: bool
    """Whether the loss is scaled up for fp16, and a step skipped when a gradient overflows."""

    def forward(self, views: Sequence[Tensor], token_ids: Tensor) -> DualEncoderOutput:
        """All views of a micro-batch of images, and its captions."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def synchronising(self, on: bool) -> AbstractContextManager[object]:
        """Within it, a forward and its backward; ranks add up their gradients only if `on`.

        Every step has one micro-batch for which it is on, the last; without it, on is meant.
        """
        ...

    def step(self, clip_norm: float | None) -> float:
        """Clip, step, clear gradients, clamp the logit scale; returns the norm before clipping."""
        ...

    def state(self) -> EngineState:
        """Weights and optimizer, for a checkpoint; every rank calls it."""
        ...

    def load_state(self, saved: SavedState) -> None:
        """Continue from a checkpoint, of any engine and number of ranks; every rank calls it.

        Raises:
            CheckpointError: If it does not fit the model.
        """
        ...


_SCALER: Final = "loss scaler/"
_DTYPES: Final = {
    "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16,
}  # fmt: skip


class TorchEngine:
    """Plain PyTorch; `DistributedDataParallel` when there is more than one rank."""

    def __init__(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        config: TorchEngineConfig,
        world: World,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scales_loss = config.precision == "fp16"
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=self.scales_loss)
        self._world = world
        precision = config.precision
        if precision == "auto":
            precision = "bf16" if computes_bf16(world.device) else "fp32"
        if precision == "fp8":
            convert_to_fp8(model, world.device)
        self._dtype = _DTYPES[precision]
        compiled = ", compiled" if config.compile else ""
        self.description = f"{world.size} x {world.device.type}, {precision}{compiled}"
        for module in model.modules():  # convolutions run faster with channels innermost
            if isinstance(module, nn.Conv2d):
                weight = module.weight
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        if config.compile:
            model.compile()
        self._wrapped: nn.Module = model
        if world.size > 1:
            self._wrapped = DistributedDataParallel(model)

    def forward(self, views: Sequence[Tensor], token_ids: Tensor) -> DualEncoderOutput:
        with self._autocast():
            output: DualEncoderOutput = self._wrapped(views[0], token_ids, *views[1:])
        return output

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def synchronising(self, on: bool) -> AbstractContextManager[object]:
        if on or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()

    def step(self, clip_norm: float | None) -> float:
        limit = float("inf") if clip_norm is None else clip_norm
        self._scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self._scaler.step(self.optimizer)  # not if a gradient overflowed
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        clamp_logit_scale(self.model)
        return float(norm)

    def state(self) -> EngineState:
        weights = own_pieces(self.model.state_dict(), self._world)
        tensors, numbers = optimizer_state(self.model, self.optimizer)
        for key, value in self._scaler.state_dict().items():
            numbers[_SCALER + key] = float(value)
        return EngineState(
            weights=weights, optimizer=own_pieces(tensors, self._world), numbers=numbers
        )

    def load_state(self, saved: SavedState) -> None:
        fill_weights(self.model.state_dict(), saved.weights)
        fill_optimizer(self.model, self.optimizer, saved.optimizer, saved.numbers)
        scaler = self._scaler.state_dict()
        if all(_SCALER + key in saved.numbers for key in scaler):
            kept = {key: type(value)(saved.numbers[_SCALER + key]) for key, value in scaler.items()}
            self._scaler.load_state_dict(kept)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._world.device.type, self._dtype)


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic, rather than emulating it slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
