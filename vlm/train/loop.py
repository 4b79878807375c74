"""The training loop, top to bottom."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import yaml
from rich.console import Console
from torch import Tensor

from vlm.distributed import World, any_rank, barrier, watch_ranks
from vlm.errors import VlmError
from vlm.files import write_text_whole
from vlm.models import set_logit_scale
from vlm.optim import learning_rate_factor, set_learning_rates
from vlm.train.alone import alone_in
from vlm.train.average import update_average
from vlm.train.checkpoint import open_writer
from vlm.train.config import TrainConfig
from vlm.train.faults import SKIPPED, FaultWatch, SkippedWindows, advice, disk_faults_told
from vlm.train.held_out import HeldOut
from vlm.train.places import checkpoint_place
from vlm.train.records import truncate_records
from vlm.train.restore import restore, roll_back
from vlm.train.setup import Parts, build_parts, resume_facts
from vlm.train.signals import stop_on_signal
from vlm.train.step import train_step
from vlm.train.telemetry import Telemetry, open_telemetry
from vlm.types import Batch

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

    SIGINT and SIGTERM end it after the step in progress, with a checkpoint saved. After a fault (a
    loss that is not finite, say) it goes back to the last checkpoint and leaves out what led there.

    Raises:
        CheckpointError: If the run folder holds checkpoints and `resume` is false, they belong
            to another configuration or dataset, one cannot be written, or another process trains.
        DataError: If a sample cannot be read.
        VlmError: If there are more faults than `config.recovery` allows.
    """
    started = time.monotonic()
    parts = build_parts(config, world)
    with disk_faults_told(config.run_folder), alone_in(config.run_folder, world):
        return _train(config, parts, world=world, console=console, resume=resume, started=started)


def _train(
    config: TrainConfig,
    parts: Parts,
    *,
    world: World,
    console: Console,
    resume: bool,
    started: float,
) -> TrainResult:
    """The loop, in a folder that no other process writes into."""
    facts = resume_facts(config, parts)
    step, ema = restore(config, parts, facts, resume=resume, world=world, note=console.print)
    _prepare_folder(config, world, step, resume=resume)
    with (
        stop_on_signal(tell=world.is_main) as stop,
        open_telemetry(
            console,
            config,
            world,
            start_step=step,
            total_steps=parts.total_steps,
            started=started,
        ) as telemetry,
        open_writer(
            checkpoint_place(config),
            keep=config.keep_checkpoints,
            facts=facts,
            world=world,
        ) as writer,
        watch_ranks(world, after_seconds=config.recovery.stuck_after_seconds) as heartbeat,
    ):
        for line in _opening(config, parts, step):
            telemetry.note(line)
        run = _Run(config=config, parts=parts, world=world, ema=ema, step=step)
        batches = telemetry.timed(parts.stream.batches(step, parts.total_steps))
        run.held_out.restore(step)
        stopping = False
        while run.step < parts.total_steps and not stopping:
            heartbeat.beat(run.step, "waiting for data")
            batch = next(batches)
            heartbeat.beat(run.step, "computing")
            done = None if run.skipped.cover(run.step) else _trained(run, batch)
            fault = None if done is None else run.watch.fault(done.loss, done.gradient_norm)
            if any_rank(fault is not None, world):
                writer.finish()
                _go_back(run, fault or "another rank met a fault", telemetry)
                batches = telemetry.timed(parts.stream.batches(run.step, parts.total_steps))
                continue
            run.step += 1
            at_end = run.step == parts.total_steps

            if done is not None and (run.step % config.log_every == 0 or at_end):
                telemetry.report(run.step, done.figures() | parts.stream.figures(run.step))
            telemetry.enter("stalls")
            # A checkpoint that could not be written is told by `writer.save` now, not when the
            # next one is due.
            stopping = any_rank(stop.requested or writer.has_failed, world)
            judging = run.held_out.is_due(run.step)
            if run.step % config.checkpoint_every == 0 or at_end or stopping or judging:
                telemetry.enter("checkpoint")
                heartbeat.beat(run.step, "saving a checkpoint")
                state, memory = parts.engine.state(), parts.objective.memory.state()
                writer.save(run.step, state, ema=ema, memory=memory)
            if judging and not stopping:
                writer.finish()
                telemetry.enter("evaluation")
                heartbeat.beat(run.step, "evaluating")
                telemetry.note(run.held_out.evaluate(run.step))
        writer.finish()
        if stopping:
            telemetry.note(f"stopped at step {run.step}/{parts.total_steps}; checkpoint saved")
    return TrainResult(step=run.step, total_steps=parts.total_steps)


class _Run:
    """What a run holds from step to step."""

    def __init__(
        self,
        *,
        config: TrainConfig,
        parts: Parts,
        world: World,
        ema: dict[str, Tensor] | None,
        step: int,
    ) -> None:
        self.config = config
        self.parts = parts
        self.world = world
        self.ema = ema
        self.step = step
        self.watch = FaultWatch(config.recovery, overflows=parts.engine.scales_loss)
        path = config.run_folder / SKIPPED
        self.skipped = SkippedWindows(path, config.recovery, precision=config.engine.precision)
        self.held_out = HeldOut(
            config, parts.objective.memory, total_steps=parts.total_steps, world=world
        )


@dataclass(frozen=True, kw_only=True)
class _Done:
    """How a step went."""

    loss: float
    gradient_norm: float
    lr: float
    statistics: dict[str, Tensor]

    def figures(self) -> dict[str, float]:
        """For the log."""
        return {
            "loss": self.loss,
            **{name: float(value) for name, value in self.statistics.items()},
            "gradient_norm": self.gradient_norm,
            "lr": self.lr,
        }


def _trained(run: _Run, batch: Batch) -> _Done:
    """Set the learning rate, train on a batch, and move the average of weights."""
    config, parts = run.config, run.parts
    factor = learning_rate_factor(
        config.optim.schedule, run.step, parts.total_steps, global_batch=config.global_batch
    )
    set_learning_rates(parts.engine.optimizer, factor)
    progress = run.step / parts.total_steps
    if config.temperature is not None:
        set_logit_scale(parts.engine.model, 1 / config.temperature.weight(progress))
    loss, gradient_norm = train_step(
        config,
        parts.engine,
        parts.objective,
        batch,
        micro_batch=parts.micro_batch,
        step=run.step,
        progress=progress,
        world=run.world,
    )
    if run.ema is not None and config.ema_decay is not None:
        weights = parts.engine.model.state_dict()
        update_average(run.ema, weights, decay=config.ema_decay, step=run.step)
    return _Done(
        loss=float(loss.total.detach()),
        gradient_norm=gradient_norm,
        lr=factor * config.optim.lr,
        statistics=loss.statistics,
    )


def _go_back(run: _Run, fault: str, telemetry: Telemetry) -> None:
    """Return to the last checkpoint, to leave out the steps that led to a fault.

    Raises:
        VlmError: If there is none to return to, or the run has been rolled back too often.
    """
    window = run.skipped.add(run.step, fault, write=run.world.is_main)
    step = roll_back(run.config, run.parts, run.ema, before=window.first_step)
    if step is None:
        message = (
            f"{run.config.run_folder}: {fault} at step {run.step + 1}, and there is no checkpoint "
            f"from before to go back to. {advice(run.config.engine.precision)}"
        )
        raise VlmError(message)
    telemetry.note(
        f"step {run.step + 1}: {fault}; back to step {step}, leaving out "
        f"{window.last_step - window.first_step + 1} steps up to it"
    )
    if run.world.is_main:
        truncate_records(run.config.run_folder / "metrics.jsonl", step)
    run.held_out.restore(step)
    run.step = step


def _opening(config: TrainConfig, parts: Parts, start: int) -> Iterator[str]:
    """What is about to happen, and what may not be meant so."""
    parameters = sum(p.numel() for p in parts.engine.model.parameters())
    begin = f"from step {start}" if start else "from scratch"
    yield (
        f"{config.name}: {parameters / 1e6:.1f}M parameters, {parts.total_steps} steps of "
        f"{config.global_batch} of {parts.num_samples} pairs, {begin}, {parts.engine.description}"
    )
    if config.global_batch > parts.num_samples:
        yield (
            "warning: a step is larger than the data, so pairs are their own negatives; "
            f"lower global_batch to {max(parts.num_samples // 2, 1)} or less"
        )
    yield from (f"note: {hint}" for hint in config.optim.advice())


def _prepare_folder(config: TrainConfig, world: World, step: int, *, resume: bool) -> None:
    """Write down what is run, and drop the records of steps that will be done again.

    A run that begins anew does not leave out what an earlier one of its name left out.
    """
    if world.is_main:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_text_whole(config.run_folder / "config.yaml", text)
        truncate_records(config.run_folder / "metrics.jsonl", step)
        if not resume:
            (config.run_folder / SKIPPED).unlink(missing_ok=True)
    barrier(world)
