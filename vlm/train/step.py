"""One step of training, from a batch as the data plane gives it to changed weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.data.augment import augment_views
from vlm.data.views import draw_views
from vlm.distributed import World
from vlm.preprocess import normalise_images, trim_padding
from vlm.train.config import TrainConfig
from vlm.train.engine import Engine
from vlm.train.gradient_cache import backward_by_parts
from vlm.train.objective import Objective
from vlm.train.watch import watch_geometry, watch_gradients
from vlm.types import Batch, CaptionSum, DualEncoderOutput, LossOutput

__all__ = ["train_step"]


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """What one forward reads, on its device."""

    gray_levels: list[Float[Tensor, "batch channel _ _"]]
    """All augmented views, 0 to 255."""
    token_ids: Int64[Tensor, "batch token"]


def train_step(
    config: TrainConfig,
    engine: Engine,
    objective: Objective,
    batch: Batch,
    *,
    micro_batch: int,
    step: int,
    progress: float,
    world: World,
) -> tuple[LossOutput, float]:
    """Augment, forward, loss of the global batch, backward, clip and step.

    A batch of more than `micro_batch` samples goes through the gradient cache.

    Returns:
        The loss, and the norm of its gradient before clipping.
    """
    count = len(batch.images) // micro_batch
    read = _micro_batches(config, batch, micro_batch=micro_batch, step=step, world=world)

    def forward(index: int) -> DualEncoderOutput:
        micro = read(index)
        views = [
            normalise_images(view, config.image).contiguous(memory_format=torch.channels_last)
            for view in micro.gray_levels
        ]
        # Dropout and the like: keyed by the step and the place in the global batch, so a resumed
        # run draws the same numbers, as do any number of ranks with micro-batches of one size.
        place = (step * world.size + world.rank) * count + index
        torch.manual_seed((config.seed << 32) + place)
        return engine.forward(views, micro.token_ids)

    taught = [
        objective.teach(micro.gray_levels[0], micro.token_ids)
        for micro in (map(read, range(count)) if objective.has_teacher else ())
    ]

    def evaluate(output: DualEncoderOutput, captions: CaptionSum | None = None) -> LossOutput:
        loss = objective(output, batch, captions=captions, taught=taught, progress=progress)
        if watching:
            loss.statistics.update(watch_geometry(output))
        return loss

    watching = (step + 1) % config.log_every == 0
    if count == 1:
        loss = evaluate(forward(0))
        engine.backward(loss.total)
    else:
        parts = [partial(forward, index) for index in range(count)]
        loss = backward_by_parts(engine, parts, evaluate)
    if watching:
        loss.statistics.update(watch_gradients(engine.model))
    return loss, engine.step(config.optim.clip_norm)


def _micro_batches(
    config: TrainConfig, batch: Batch, *, micro_batch: int, step: int, world: World
) -> Callable[[int], _MicroBatch]:
    """Reads the micro-batch of an index: the same at every call, since changes are drawn before."""
    draws = draw_views(
        seed=config.seed,
        step=step,
        global_batch=config.global_batch,
        num_views=config.data.augment.views.total,
    )

    @lru_cache(maxsize=1)
    def read(index: int) -> _MicroBatch:
        own = slice(index * micro_batch, (index + 1) * micro_batch)
        first = world.rank * len(batch.images) + own.start
        gray_levels = augment_views(
            batch.images[own].to(world.device, non_blocking=True),
            draws[:, first : first + micro_batch],
            config.data.augment,
            size=config.image.size,
        )
        token_ids = trim_padding(batch.token_ids[own]).to(world.device, non_blocking=True)
        return _MicroBatch(gray_levels=gray_levels, token_ids=token_ids)

    return read
