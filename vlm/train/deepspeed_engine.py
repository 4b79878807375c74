"""DeepSpeed ZeRO stages 0 to 2; the only importer of deepspeed.

The loop's own optimizer is handed to DeepSpeed as a client optimizer, so Lion, its groups and the
schedule are the same on every engine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from torch import Tensor

from vlm.distributed import World
from vlm.errors import CheckpointError
from vlm.models import Model, clamp_logit_scale
from vlm.train.config import DeepSpeedEngineConfig
from vlm.types import DualEncoderOutput

__all__ = ["DeepSpeedEngine"]

_FOLDER = "deepspeed"


class DeepSpeedEngine:
    """A model and optimizer under `deepspeed.initialize`; see `vlm.train.engine.Engine`.

    Args:
        model: A dual encoder or a CoCa.
        optimizer: The loop's optimizer.
        config: ZeRO stage and precision.
        world: The ranks; a process group must exist, even for one rank.
        micro_batch: Samples of a rank in one forward.
        accumulation: Micro-batches of a rank in one step.
        clip_norm: DeepSpeed clips by itself, so it needs to know at the start.
    """

    def __init__(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        config: DeepSpeedEngineConfig,
        world: World,
        *,
        micro_batch: int,
        accumulation: int,
        clip_norm: float | None,
    ) -> None:
        if world.device.type == "cpu":
            # DeepSpeed would compile a shared-memory extension for half a minute, for no gain.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_norm or 0.0,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": config.precision == "bf16"},
        }
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.model = model
        self.description = (
            f"{world.size} x {world.device.type}, {config.precision}, ZeRO {config.zero_stage}"
        )
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32

    def forward(self, views: Sequence[Tensor], token_ids: Tensor) -> DualEncoderOutput:
        first, *others = [images.to(self._dtype) for images in views]
        output: DualEncoderOutput = self._engine(first, token_ids, *others)
        return output

    def backward(self, loss: Tensor) -> None:
        # The loss is that of all micro-batches already, so it is not divided by their number.
        self._engine.backward(loss, scale_wrt_gas=False)

    @contextmanager
    def synchronising(self, on: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(on)
        yield

    def step(self, clip_norm: float | None) -> float:
        self._engine.step()
        # Sharded optimizers keep a master copy out of reach; models clamp in forward too.
        clamp_logit_scale(self.model)
        norm = self._engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    def save_optimizer(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_FOLDER, save_latest=False)

    def load_optimizer(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag=_FOLDER)
        if path is None:
            message = f"{folder / _FOLDER}: DeepSpeed found no state to resume from"
            raise CheckpointError(message)
