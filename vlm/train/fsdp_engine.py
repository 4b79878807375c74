"""Fully sharded data parallel: parameters, gradients and optimizer state spread over the ranks."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from vlm.distributed import World, set_gradient_synchronisation, shard, whole
from vlm.models import Model, clamp_logit_scale
from vlm.train.config import FsdpEngineConfig
from vlm.train.engine import computes_bf16
from vlm.train.shards import own_pieces
from vlm.train.state import EngineState, SavedState, fill_optimizer, fill_weights, optimizer_state
from vlm.types import CaptionRows, DualEncoderOutput

__all__ = ["FsdpEngine", "shard_model"]


def shard_model(model: Model, config: FsdpEngineConfig, world: World) -> None:
    """Spread a model over the ranks, before its optimizer is made."""
    model.register_forward_hook(_without_parameters)
    shard(
        model,
        world,
        dtype=torch.bfloat16 if _bf16(config, world) else None,
        offload=config.offload,
        methods=("encode_image", "encode_text", "memory_of"),
        outputs=(DualEncoderOutput, CaptionRows),
    )


def _without_parameters(
    module: nn.Module, inputs: tuple[Tensor, ...], output: DualEncoderOutput
) -> DualEncoderOutput:
    """Copies of parameters in place of themselves, whose memory is not theirs after a forward."""
    bias, captions = output.logit_bias, output.captions
    return replace(
        output,
        logit_bias=None if bias is None else bias.clone(),
        captions=None
        if captions is None
        else replace(captions, vocabulary=captions.vocabulary.clone()),
    )


class FsdpEngine:
    """A sharded model and the optimizer of its parts; see `vlm.train.engine.Engine`.

    Args:
        model: As `shard_model` left it.
        optimizer: Of its parameters.
        config: Precision and offload.
        world: The ranks; a process group must exist, even for one rank.
    """

    def __init__(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        config: FsdpEngineConfig,
        world: World,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scales_loss = False
        self._world = world
        self._bf16 = _bf16(config, world)
        kind = "bf16" if self._bf16 else "fp32"
        self.description = f"{world.size} x {world.device.type}, {kind}, fully sharded"

    def forward(self, views: Sequence[Tensor], token_ids: Tensor) -> DualEncoderOutput:
        with self._autocast():
            output: DualEncoderOutput = self.model(views[0], token_ids, *views[1:])
        return output

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @contextmanager
    def synchronising(self, on: bool) -> Iterator[None]:
        set_gradient_synchronisation(self.model, on)
        yield
        set_gradient_synchronisation(self.model, True)

    def step(self, clip_norm: float | None) -> float:
        limit = float("inf") if clip_norm is None else clip_norm
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clamp_logit_scale(self.model)
        return float(norm)

    def state(self) -> EngineState:
        weights = own_pieces(self.model.state_dict(), self._world)
        tensors, numbers = optimizer_state(self.model, self.optimizer)
        return EngineState(
            weights=weights, optimizer=own_pieces(tensors, self._world), numbers=numbers
        )

    def load_state(self, saved: SavedState) -> None:
        fill_weights(self.model.state_dict(), saved.weights)
        fill_optimizer(self.model, self.optimizer, saved.optimizer, saved.numbers)

    def _autocast(self) -> AbstractContextManager[object]:
        if not self._bf16:
            return nullcontext()
        return torch.autocast(self._world.device.type, torch.bfloat16)


def _bf16(config: FsdpEngineConfig, world: World) -> bool:
    return config.precision == "bf16" or (
        config.precision == "auto" and computes_bf16(world.device)
    )
