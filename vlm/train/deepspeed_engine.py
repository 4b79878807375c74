"""DeepSpeed ZeRO stages 0 to 3; the only importer of deepspeed.

The loop's own optimizer is handed to DeepSpeed as a client optimizer, so Lion, its groups and the
schedule are the same on every engine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from vlm.distributed import Piece, World, piece_of
from vlm.errors import ConfigError
from vlm.models import Model, clamp_logit_scale
from vlm.train.config import DeepSpeedEngineConfig
from vlm.train.state import EngineState, SavedState, begin_optimizer, check_names, fill_number
from vlm.types import CaptionRows, DualEncoderOutput

__all__ = ["DeepSpeedEngine"]


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
            if config.precision == "fp16":
                message = (
                    "engine.precision=fp16: DeepSpeed has none on a CPU; take bf16 or fp32, or "
                    "engine.type=torch"
                )
                raise ConfigError(message)
            # DeepSpeed would compile a shared-memory extension for half a minute, for no gain.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        offload = {"device": "cpu"} if config.offload else {"device": "none"}
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_norm or 0.0,
            "zero_optimization": {
                "stage": config.zero_stage,
                **({"offload_optimizer": offload} if config.zero_stage else {}),
                **({"offload_param": offload} if config.zero_stage == 3 else {}),
                "stage3_param_persistence_threshold": config.persistence_threshold,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": config.precision == "bf16"},
            "fp16": {"enabled": config.precision == "fp16"},
        }
        if config.zero_stage == 3:
            _register_direct_parameters(model)
            model.register_forward_hook(_to_tuple)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.model = model
        self.scales_loss = config.precision == "fp16"
        self.description = (
            f"{world.size} x {world.device.type}, {config.precision}, ZeRO {config.zero_stage}"
        )
        self._world = world
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
            config.precision
        ]
        self._flat = _flat_partitions(self.optimizer)
        self._sharded = bool(self._flat)

    def forward(self, views: Sequence[Tensor], token_ids: Tensor) -> DualEncoderOutput:
        first, *others = [images.to(self._dtype) for images in views]
        output: Any = self._engine(first, token_ids, *others)
        return output if isinstance(output, DualEncoderOutput) else _from_tuple(output)

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

    def state(self) -> EngineState:
        self._link()
        weights: dict[str, Piece] = {}
        optimizer: dict[str, Piece] = {}
        numbers: dict[str, float] = {}
        for index, (name, tensor) in enumerate(self.model.state_dict(keep_vars=True).items()):
            # All ranks gather a tensor; one of them keeps it.
            own = index % self._world.size == self._world.rank
            gathered = {"": _gathered(tensor)}
            kept = self._kept_of(tensor)
            for key, value in kept.items():
                if isinstance(value, Tensor) and value.ndim:
                    found = safe_get_full_optimizer_state(tensor, key) if self._sharded else value
                    gathered[f"/{key}"] = found
                else:
                    numbers[f"{name}/{key}"] = float(value)
            for key, found in gathered.items() if own else ():
                local = found.detach().to("cpu", copy=True)
                target = optimizer if key else weights
                target[name + key] = piece_of(local.reshape(_shape(tensor)))
        return EngineState(weights=weights, optimizer=optimizer, numbers=numbers)

    def load_state(self, saved: SavedState) -> None:
        tensors = self.model.state_dict(keep_vars=True)
        check_names(tensors, saved.weights)
        self._begin()
        self._link()
        with torch.no_grad():
            for name, tensor in tensors.items():
                _set_weight(tensor, saved.weights.whole(name).to(self._world.device), self._world)
                kept = self._kept_of(tensor)
                for key, value in kept.items():
                    if not isinstance(value, Tensor) or not value.ndim:
                        fill_number(kept, key, f"{name}/{key}", saved.numbers)
                        continue
                    found = saved.optimizer.whole(f"{name}/{key}").to(self._world.device)
                    if self._sharded:
                        _set_part(tensor, found, self._world, key)
                    else:
                        value.copy_(found)

    def _kept_of(self, tensor: Tensor) -> dict[str, Any]:
        """What the optimizer keeps of a parameter, or of the flat partition that holds it."""
        base = getattr(self.optimizer, "optimizer", self.optimizer)
        _, flat = self._flat.get(id(tensor), (tensor, tensor))
        return dict.get(base.state, flat, {})

    def _begin(self) -> None:
        """Let the optimizer make its state, which DeepSpeed leaves to the first step."""
        base = getattr(self.optimizer, "optimizer", self.optimizer)
        if base.state:
            return
        if hasattr(self.optimizer, "fp32_partitioned_groups_flat"):  # stage 3 hides its parameters
            self.optimizer._set_fp32_optimizer_param_groups()
            begin_optimizer(base)
            self.optimizer._clear_fp32_optimizer_param_groups()
        else:
            begin_optimizer(base)

    def _link(self) -> None:
        """Tie parameters to their part of the optimizer's state.

        DeepSpeed does so after the first step of its first group, when others have no state yet.
        """
        for parameter, flat in self._flat.values():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                mapping.set_optim_state_fragment(flat, self._kept_of(parameter))


def _register_direct_parameters(model: nn.Module) -> None:
    """Have stage 3 gather with the model what it reads past the forward of its towers."""
    for module in model.modules():
        if module is not model and next(module.children(), None) is not None:
            for parameter in module.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(model, parameter)


def _to_tuple(
    module: nn.Module, inputs: tuple[Tensor, ...], output: DualEncoderOutput
) -> tuple[Tensor, ...]:
    """What stage 3 finds tensors in, to gather parameters before their backward.

    Parameters themselves are copied, since they are given back to their ranks after a forward.
    Empty tensors stand for what is not there.
    """
    nothing = output.image.new_empty(0)
    rows = output.captions
    return (
        output.image,
        output.text,
        output.logit_scale,
        nothing if output.logit_bias is None else output.logit_bias.clone(),
        *((nothing,) * 3 if rows is None else (rows.hidden, rows.targets, rows.vocabulary.clone())),
        *output.more_images,
    )


def _from_tuple(tensors: tuple[Tensor, ...]) -> DualEncoderOutput:
    image, text, logit_scale, bias, hidden, targets, vocabulary, *more = tensors
    captions = None
    if vocabulary.numel():
        captions = CaptionRows(hidden=hidden, targets=targets, vocabulary=vocabulary)
    return DualEncoderOutput(
        image=image,
        text=text,
        logit_scale=logit_scale,
        logit_bias=bias if len(bias) else None,
        more_images=tuple(more),
        captions=captions,
    )


def _flat_partitions(optimizer: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """By the id of a parameter: it, and the tensor that the optimizer sees in its place."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        groups = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # stages 1 and 2
        groups = zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):  # bf16 at stage 0
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
    else:
        return {}
    return {
        id(parameter): (parameter, flat) for parameters, flat in groups for parameter in parameters
    }


def _shape(tensor: Tensor) -> torch.Size:
    return getattr(tensor, "ds_shape", tensor.shape)


def _gathered(tensor: Tensor) -> Tensor:
    if tensor.requires_grad and (hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")):
        return safe_get_full_fp32_param(tensor)
    if hasattr(tensor, "ds_id"):
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def _set_weight(tensor: Tensor, value: Tensor, world: World) -> None:
    if hasattr(tensor, "ds_id"):
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            if world.is_main:
                tensor.data.copy_(value)
    else:
        tensor.data.copy_(value)
    if tensor.requires_grad and (hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")):
        _set_part(tensor, value, world, None)


def _set_part(tensor: Tensor, value: Tensor, world: World, key: str | None) -> None:
    """Set the float32 copy of a parameter, or what the optimizer keeps of it, where it is ours."""
    if not hasattr(tensor, "ds_id"):
        tensor.set_full_hp_param(value.float(), key)  # type: ignore[attr-defined] # DeepSpeed adds it
        return
    # Partitions are equally long, the last one padded.
    length = tensor.ds_tensor.numel()  # type: ignore[attr-defined] # DeepSpeed adds it
    padded = F.pad(value.float().flatten(), (0, length * world.size - value.numel()))
    part = padded[world.rank * length : (world.rank + 1) * length]
    if key is None:
        safe_set_local_fp32_param(tensor, part)
    else:
        safe_set_local_optimizer_state(tensor, part, key)
