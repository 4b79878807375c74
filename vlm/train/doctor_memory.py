"""How much memory a rank will need, from two small steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vlm.distributed import World
from vlm.train.config import TrainConfig
from vlm.train.engine import Engine, TorchEngine
from vlm.train.objective import Objective, global_loss
from vlm.train.state import EngineState, SavedState
from vlm.train.step import train_step
from vlm.types import Batch, DualEncoderOutput

__all__ = ["MemoryForecast", "Probe", "forecast_memory", "peak_bytes", "probe_steps"]

_LOSS_ROWS = (512, 1024)
_ALLOCATOR = 1.1
"""The C library's allocator keeps some of what is freed; measured, see README.md."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Two small steps of one process, measured."""

    batches: tuple[int, int]
    """Samples of the two steps, the smaller first."""
    seconds: tuple[float, float]
    backward_bytes: tuple[int, int]
    """Most memory at one time of forward, loss and backward, gradients included."""
    step_bytes: int
    """Most memory of the optimizer's step, beside parameters, gradients and state."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    loss_bytes: tuple[int, int]
    """Of the loss and its gradient alone, at 512 and 1024 rows."""


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """Bytes of one rank."""

    parameters: int
    optimizer: int
    ema: int
    gradients: int
    """All copies of them."""
    activations: int
    """What else forward, loss and backward need at once."""
    loss: int
    """What the loss of the global batch needs beyond that of a micro-batch."""
    loader: int
    """Decoded images, in main memory."""
    process: int
    """Python and its libraries, in main memory."""
    tensors: int = field(default=0)
    """Most on the device at one time; the parts above do not all peak together."""

    @property
    def host(self) -> int:
        """Main memory of a rank that computes on the CPU."""
        return round(self.tensors * _ALLOCATOR) + self.loader + self.process


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors made by `work` took at one time."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    assert trace.profiler is not None
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


class _WithoutStep:
    """An engine that keeps its gradients."""

    def __init__(self, engine: TorchEngine) -> None:
        self.model, self.optimizer, self.description = engine.model, engine.optimizer, ""
        self.scales_loss = engine.scales_loss
        self.forward, self.backward = engine.forward, engine.backward

    def synchronising(self, on: bool) -> AbstractContextManager[object]:
        raise NotImplementedError

    def step(self, clip_norm: float | None) -> float:
        return 0.0

    def state(self) -> EngineState:
        raise NotImplementedError

    def load_state(self, saved: SavedState) -> None:
        raise NotImplementedError


def probe_steps(
    config: TrainConfig,
    engine: TorchEngine,
    objective: Objective,
    pool: Batch,
    world: World,
    *,
    micro_batch: int,
    clock: Callable[[], float],
) -> Probe:
    """Train some small steps on the longest captions of `pool`, and measure them.

    The weights of `engine` change. The micro-batch itself is measured if it is small.
    """
    largest = min(micro_batch, len(pool.images), 16)
    batches = (max(largest // 2, 1), largest)
    # Padding is trimmed to the longest caption, and a large batch has a long one.
    order = (pool.token_ids != 0).sum(dim=1).argsort(descending=True)

    def steps(size: int, engine: Engine) -> Callable[[], object]:
        rows = order[:size]
        batch = Batch(
            images=pool.images[rows],
            token_ids=pool.token_ids[rows],
            sample_ids=pool.sample_ids[rows],
            group_ids=pool.group_ids[rows],
            label_ids=None if pool.label_ids is None else pool.label_ids[rows],
        )
        own = config.model_copy(update={"global_batch": size, "log_every": 10**9})
        return lambda: train_step(
            own, engine, objective, batch, micro_batch=size, step=0, progress=0.0, world=world
        )

    seconds, peaks = [], []
    for size in batches:
        steps(size, engine)()
        times = []
        for _ in range(3):
            start = clock()
            steps(size, engine)()
            times.append(clock() - start)
        seconds.append(min(times))
        peaks.append(peak_bytes(steps(size, _WithoutStep(engine)), world.device))
        if size == batches[0]:
            engine.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        dim = engine.model.encode_text(pool.token_ids[:1].to(world.device)).shape[1]
    gradients = sum(_size(p.grad) for p in engine.model.parameters() if p.grad is not None)
    clip = config.optim.clip_norm
    step_bytes = peak_bytes(lambda: engine.step(clip), world.device)
    state = [v for entry in engine.optimizer.state.values() for v in entry.values()]
    return Probe(
        batches=batches,
        seconds=(seconds[0], seconds[1]),
        backward_bytes=(peaks[0], peaks[1]),
        step_bytes=step_bytes,
        parameter_bytes=sum(
            _size(t) for t in (*engine.model.parameters(), *engine.model.buffers())
        ),
        gradient_bytes=gradients,
        optimizer_bytes=sum(_size(v) for v in state if isinstance(v, Tensor)),
        loss_bytes=_loss_bytes(config, dim, world),
    )


def forecast_memory(
    config: TrainConfig,
    probe: Probe,
    *,
    world_size: int,
    micro_batch: int,
    loader_bytes: int,
    process_bytes: int,
) -> MemoryForecast:
    """The memory of one of `world_size` ranks at `micro_batch` samples a forward."""
    parameters, gradients = probe.parameter_bytes, probe.gradient_bytes
    optimizer = probe.optimizer_bytes
    ema = parameters if config.ema_decay is not None else 0
    backward = _line(probe.batches, probe.backward_bytes, micro_batch)
    small_loss = _line(_LOSS_ROWS, probe.loss_bytes, micro_batch)
    loss = max(_line(_LOSS_ROWS, probe.loss_bytes, config.global_batch) - small_loss, 0)
    activations = max(backward - gradients, 0)
    kept, shards_gradients, state_share = _spread(config, world_size)
    parameters = round(parameters * kept)
    optimizer = round(optimizer * state_share)
    copies = 2 if config.engine.type == "torch" and world_size > 1 else 1  # DDP's buckets
    held = round(gradients * shards_gradients) * copies
    # In backward, gradients appear while activations go; `backward` has seen how far they overlap.
    extra = max(held - gradients, 0)
    step = held + round(probe.step_bytes * state_share)
    tensors = parameters + optimizer + ema + max(backward + loss + extra, step)
    return MemoryForecast(
        parameters=parameters,
        optimizer=optimizer,
        ema=ema,
        gradients=held,
        activations=activations,
        loss=loss,
        loader=loader_bytes,
        process=process_bytes,
        tensors=tensors,
    )


def _spread(config: TrainConfig, world_size: int) -> tuple[float, float, float]:
    """Which fraction of parameters, gradients and optimizer state a rank holds."""
    share = 1 / world_size
    if config.engine.type == "torch":
        return 1.0, 1.0, 1.0
    stage = getattr(config.engine, "zero_stage", 3)  # FSDP2 spreads what ZeRO 3 spreads
    return (
        share if stage >= 3 else 1.0,
        share if stage >= 2 else 1.0,
        share if stage >= 1 else 1.0,
    )


def _loss_bytes(config: TrainConfig, dim: int, world: World) -> tuple[int, int]:
    """Peaks of the loss at random features; captions are not features, so they are left out."""
    terms = [term for term in config.loss if term.type != "caption"]
    peaks = []
    for rows in _LOSS_ROWS:

        def evaluate(rows: int = rows) -> None:
            def features() -> Tensor:
                made = torch.randn(rows, dim, device=world.device)
                return torch.nn.functional.normalize(made, dim=1).requires_grad_()

            scale = torch.full((1,), 10.0, device=world.device, requires_grad=True)
            output = DualEncoderOutput(
                image=features(),
                text=features(),
                logit_scale=scale,
                logit_bias=torch.zeros(1, device=world.device),
            )
            loss = global_loss(
                output,
                torch.arange(rows, device=world.device),
                terms,
                progress=0.0,
                world=World(device=world.device),
                teacher=output if config.teacher is not None else None,
            )
            loss.total.backward()

        peaks.append(peak_bytes(evaluate, world.device) if terms else 0)
    return peaks[0], peaks[1]


def _line(at: tuple[int, int], values: tuple[int, int], where: int) -> int:
    """The straight line through two measured values, never under the first of them beyond it."""
    if at[0] == at[1]:
        return round(values[1] * where / at[1])
    slope = (values[1] - values[0]) / (at[1] - at[0])
    return max(round(values[1] + slope * (where - at[1])), 0)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
