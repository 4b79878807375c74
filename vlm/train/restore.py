"""Back to a checkpoint: at the start of a resumed run, or in the middle of one that went wrong."""

from collections.abc import Callable, Mapping

from torch import Tensor

from vlm.distributed import World, any_rank
from vlm.errors import CheckpointError
from vlm.train.average import start_average
from vlm.train.checkpoint import Checkpoint, latest_checkpoint, set_aside_damaged
from vlm.train.config import TrainConfig
from vlm.train.places import checkpoint_place
from vlm.train.setup import Parts
from vlm.train.state import fill_weights

__all__ = ["restore", "roll_back"]


def restore(
    config: TrainConfig,
    parts: Parts,
    facts: Mapping[str, object],
    *,
    resume: bool,
    world: World,
    note: Callable[[str], None],
) -> tuple[int, dict[str, Tensor] | None]:
    """The step to start from, and the moving average of weights if the run keeps one.

    Args:
        config: Of the run.
        parts: Whose engine and memory take up the last checkpoint, if there is one.
        facts: What must be as it was.
        resume: Whether a run that exists may be continued.
        world: The ranks; all call it.
        note: Told of every damaged checkpoint that is left aside.

    Raises:
        CheckpointError: If the run exists and `resume` is false, if its checkpoint belongs to
            another configuration, or if all of them are damaged.
    """
    place = checkpoint_place(config)
    ema = None
    if config.ema_decay is not None:
        ema = start_average(parts.engine.model.state_dict())
    steps = place.steps()
    here, missing = any_rank(bool(steps), world), any_rank(not steps, world)
    if here and missing:
        message = (
            f"{place}: some ranks see checkpoints here and others do not. Let `output` lie on a "
            f"disk that all nodes see, or set `checkpoints` to an object store"
        )
        raise CheckpointError(message)
    if missing:
        return 0, ema
    if not resume:
        message = (
            f"{config.run_folder}: has checkpoints up to step {steps[-1]}. Continue it with "
            f"--resume, choose another name (name=...), or remove the folder to start anew"
        )
        raise CheckpointError(message)
    for damage in set_aside_damaged(place, world):
        note(f"a checkpoint is left aside, under the name damaged-…: {damage}")
    checkpoint = latest_checkpoint(place, check=False)
    assert checkpoint is not None
    differing = [key for key in facts if checkpoint.facts.get(key) != facts[key]]
    if differing:
        message = (
            f"{checkpoint.folder}: belongs to another run, these differ: {', '.join(differing)}. "
            f"Restore them, or choose another name (name=...)"
        )
        raise CheckpointError(message)
    _load(checkpoint, parts, ema)
    return checkpoint.step, ema


def roll_back(
    config: TrainConfig, parts: Parts, ema: dict[str, Tensor] | None, *, before: int
) -> int | None:
    """Return to the last checkpoint, if there is one before a step; all ranks call it.

    Returns:
        Its step.
    """
    checkpoint = latest_checkpoint(checkpoint_place(config))
    if checkpoint is None or checkpoint.step > before:
        return None
    _load(checkpoint, parts, ema)
    return checkpoint.step


def _load(checkpoint: Checkpoint, parts: Parts, ema: dict[str, Tensor] | None) -> None:
    parts.engine.load_state(checkpoint.state())
    parts.objective.memory.load(checkpoint.folder)
    if ema is None:
        return
    average = checkpoint.average()
    if average.shapes:
        fill_weights(ema, average)
    else:  # the run kept none until now
        ema.update(start_average(parts.engine.model.state_dict()))
