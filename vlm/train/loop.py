"""The training loop, top to bottom."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
import yaml
from rich.console import Console
from torch import Tensor

from vlm.distributed import World, any_rank
from vlm.errors import CheckpointError, VlmError
from vlm.files import write_text_whole
from vlm.optim import learning_rate_factor, set_learning_rates
from vlm.train.checkpoint import latest_checkpoint, load_weights, save_checkpoint
from vlm.train.config import TrainConfig
from vlm.train.setup import Parts, build_parts, resume_facts
from vlm.train.step import train_step
from vlm.train.telemetry import open_telemetry, truncate_metrics
from vlm.types import LossOutput

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int
    total_steps: int

    @property
    def finished(self) -> bool:
        """False when a signal stopped it; a checkpoint was saved and the run can resume."""
        return self.step == self.total_steps


def train(config: TrainConfig, *, world: World, console: Console, resume: bool) -> TrainResult:
    """Run the training that `config` describes, from its last checkpoint if `resume`.

    SIGINT and SIGTERM end it after the step in progress, with a checkpoint saved.

    Raises:
        CheckpointError: If the run folder holds checkpoints and `resume` is false, or they belong
            to another configuration or dataset.
        DataError: If a sample cannot be read.
        VlmError: If the loss is no longer finite.
    """
    parts = build_parts(config, world)
    facts = resume_facts(config, parts)
    start, ema = _restore(config, parts, facts, resume=resume)
    if world.is_main:
        _write_config(config)
        truncate_metrics(config.run_folder / "metrics.jsonl", start)
    step = start
    with (
        _stop_on_signal() as stop,
        open_telemetry(
            console, config, world, start_step=start, total_steps=parts.total_steps
        ) as telemetry,
    ):
        telemetry.note(_opening(config, parts, start))
        for advice in config.optim.advice():
            telemetry.note(f"note: {advice}")
        for batch in telemetry.timed(parts.stream.batches(start, parts.total_steps)):
            factor = learning_rate_factor(
                config.optim.schedule, step, parts.total_steps, global_batch=config.global_batch
            )
            set_learning_rates(parts.engine.optimizer, factor)
            loss, gradient_norm = train_step(
                config,
                parts.engine,
                parts.objective,
                batch,
                micro_batch=parts.micro_batch,
                step=step,
                progress=step / parts.total_steps,
                world=world,
            )
            if ema is not None and config.ema_decay is not None:
                _update_ema(ema, parts.engine.model.state_dict(), config.ema_decay, step)
            step += 1

            if step % config.log_every == 0 or step == parts.total_steps:
                figures = _figures(loss, gradient_norm, factor * config.optim.lr)
                _refuse_non_finite(figures["loss"], step, config)
                telemetry.report(step, figures | parts.stream.figures(step))
            telemetry.enter("stalls")
            stopping = any_rank(stop.requested, world)
            if step % config.checkpoint_every == 0 or step == parts.total_steps or stopping:
                telemetry.enter("checkpoint")
                save_checkpoint(
                    config.run_folder / "checkpoints",
                    parts.engine,
                    parts.objective.memory,
                    ema=ema,
                    step=step,
                    facts=facts,
                    keep=config.keep_checkpoints,
                    world=world,
                )
            if stopping:
                telemetry.note(f"stopped at step {step}/{parts.total_steps}; checkpoint saved")
                break
    return TrainResult(step=step, total_steps=parts.total_steps)


def _opening(config: TrainConfig, parts: Parts, start: int) -> str:
    """What is about to happen, in one line."""
    parameters = sum(p.numel() for p in parts.engine.model.parameters())
    begin = f"from step {start}" if start else "from scratch"
    return (
        f"{config.name}: {parameters / 1e6:.1f}M parameters, {parts.total_steps} steps of "
        f"{config.global_batch} of {parts.num_samples} pairs, {begin}, {parts.engine.description}"
    )


def _restore(
    config: TrainConfig, parts: Parts, facts: dict[str, object], *, resume: bool
) -> tuple[int, dict[str, Tensor] | None]:
    """The step to start from and the moving average of weights; loads the last checkpoint."""
    folder = config.run_folder / "checkpoints"
    checkpoint = latest_checkpoint(folder)
    model = parts.engine.model
    if checkpoint is None:
        return 0, _copy(model.state_dict()) if config.ema_decay is not None else None
    if not resume:
        message = (
            f"{config.run_folder}: has checkpoints up to step {checkpoint.step}. Continue it with "
            f"--resume, choose another name (name=...), or remove the folder to start anew"
        )
        raise CheckpointError(message)
    differing = [key for key in facts if checkpoint.facts.get(key) != facts[key]]
    if differing:
        message = (
            f"{checkpoint.folder}: belongs to another run, these differ: {', '.join(differing)}. "
            f"Restore them, or choose another name (name=...)"
        )
        raise CheckpointError(message)
    weights = load_weights(checkpoint, ema=False)
    assert weights is not None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        message = f"{checkpoint.folder}: weights do not fit the configured model ({error})"
        raise CheckpointError(message) from error
    parts.engine.load_optimizer(checkpoint.folder)
    parts.objective.memory.load(checkpoint.folder)
    ema = None
    if config.ema_decay is not None:
        ema = load_weights(checkpoint, ema=True) or _copy(model.state_dict())
    return checkpoint.step, ema


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@torch.no_grad()
def _update_ema(ema: dict[str, Tensor], state: dict[str, Tensor], decay: float, step: int) -> None:
    """Move the average towards the weights, faster at the start when it holds the random ones."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, average in ema.items():
        if average.is_floating_point():
            average.lerp_(state[name].to(average.device), 1 - decay)
        else:
            average.copy_(state[name])


def _figures(loss: LossOutput, gradient_norm: float, lr: float) -> dict[str, float]:
    statistics = {name: float(value) for name, value in loss.statistics.items()}
    return {
        "loss": float(loss.total.detach()),
        **statistics,
        "gradient_norm": gradient_norm,
        "lr": lr,
    }


def _refuse_non_finite(loss: float, step: int, config: TrainConfig) -> None:
    if not math.isfinite(loss):
        message = (
            f"{config.run_folder}: the loss is {loss} at step {step}. The last checkpoint is from "
            f"before; lower optim.lr, lengthen the warm-up or use engine.precision=fp32, then "
            f"start a run of another name"
        )
        raise VlmError(message)


def _write_config(config: TrainConfig) -> None:
    config.run_folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_text_whole(config.run_folder / "config.yaml", text)


@dataclass
class _Stop:
    requested: bool = field(default=False)


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """Turn the first SIGINT or SIGTERM into a flag; a second SIGINT interrupts at once."""
    stop = _Stop()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
