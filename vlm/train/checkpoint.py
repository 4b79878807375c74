"""Checkpoints: resumable, atomic, and never unpickled.

    runs/<name>/checkpoints/step-00000500/
        model.safetensors    weights
        ema.safetensors      moving average of the weights, if the run keeps one
        memory-NNNNN.safetensors  what loss terms remember, the part of each rank, if they do
        optimizer.pt         optimizer state, loaded with weights_only (or DeepSpeed's own folder)
        checkpoint.json      step and what the run was made of; written last

A checkpoint is written under a hidden name and renamed when it is complete, so a crash while
saving never costs the last good one. The data position is the step; randomness is keyed by it.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm.distributed import World, barrier
from vlm.errors import CheckpointError
from vlm.train.engine import Engine
from vlm.train.memory import LossMemory

__all__ = ["Checkpoint", "latest_checkpoint", "load_weights", "save_checkpoint"]

_INFO = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    """Optimizer steps done."""
    facts: dict[str, Any]
    """What must be the same to resume: see `setup.resume_facts`."""


def save_checkpoint(
    folder: Path,
    engine: Engine,
    memory: LossMemory,
    *,
    ema: dict[str, Tensor] | None,
    step: int,
    facts: dict[str, Any],
    keep: int,
    world: World,
) -> None:
    """Write `folder/step-NNNNNNNN`, then remove all but the newest `keep`; all ranks call it.

    Raises:
        CheckpointError: If the disk is full or the folder cannot be written; older checkpoints
            are untouched.
    """
    final = folder / f"step-{step:08d}"
    draft = folder / f".draft-{step:08d}"
    try:
        if world.is_main:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        barrier(world)
        engine.save_optimizer(draft)
        memory.save(draft)
        barrier(world)
        if world.is_main:
            save_file(_plain(engine.model.state_dict()), draft / "model.safetensors")
            if ema is not None:
                save_file(_plain(ema), draft / "ema.safetensors")
            info = {"step": step, "facts": facts}
            (draft / _INFO).write_text(json.dumps(info, indent=2), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
            for old in _complete(folder)[:-keep]:
                shutil.rmtree(old)
        barrier(world)
    # torch reports a full disk as a RuntimeError of its zip writer.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        message = (
            f"{final}: the checkpoint could not be saved ({error}). Older checkpoints are intact; "
            f"free some space or set `output` to another disk, then resume"
        )
        raise CheckpointError(message) from error


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or none.

    Raises:
        CheckpointError: If its description is damaged.
    """
    complete = _complete(folder)
    if not complete:
        return None
    path = complete[-1] / _INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        return Checkpoint(folder=complete[-1], step=int(info["step"]), facts=dict(info["facts"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}: damaged ({error}); remove {complete[-1]} to resume from an older one"
        raise CheckpointError(message) from error


def load_weights(checkpoint: Checkpoint, *, ema: bool) -> dict[str, Tensor] | None:
    """The weights of a checkpoint, or with `ema` their moving average, or none if it has none.

    Raises:
        CheckpointError: If the file is damaged.
    """
    path = checkpoint.folder / ("ema.safetensors" if ema else "model.safetensors")
    if ema and not path.is_file():
        return None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        message = f"{path}: damaged ({error}); remove {checkpoint.folder} to use an older one"
        raise CheckpointError(message) from error


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"step-*/{_INFO}"))


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
