"""Checkpoints: written while training goes on, whole or not at all, and never unpickled.

    runs/<name>/checkpoints/step-00000500/
        model-NNNNN.safetensors      weights, the part of each rank; see `shards.py`
        ema-NNNNN.safetensors        moving average of the weights, if the run keeps one
        optimizer-NNNNN.safetensors  what the optimizer keeps of each parameter
        memory-NNNNN.safetensors     what loss terms remember, if they do
        checkpoint.json              step, what the run was made of, size and hash of every file

Every rank copies its part to main memory and goes on training; a thread writes it where
`places.py` says. When the parts of all ranks are there, rank 0 makes them a checkpoint in one
stroke, so a crash while saving never costs the last good one. A checkpoint with a missing or
altered file is set aside for the one before it. The data position is the step; randomness is keyed
by it.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlm.distributed import Piece, World, any_rank, barrier
from vlm.errors import CheckpointError, VlmError
from vlm.files import file_sha256
from vlm.train.places import INFO, Place
from vlm.train.shards import ShardReader, own_pieces, snapshot, write_shard
from vlm.train.state import EngineState, SavedState

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "latest_checkpoint",
    "load_weights",
    "open_writer",
    "set_aside_damaged",
]

_WRITTEN: Final = "written-"
_FAILED: Final = "failed-"
_WAIT_SECONDS: Final = 1800.0
"""For the slowest rank to write its part."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    """Optimizer steps done."""
    facts: dict[str, Any]
    """What must be the same to resume: see `setup.resume_facts`."""
    numbers: dict[str, float]
    """See `EngineState`."""

    def state(self) -> SavedState:
        """What an engine loads."""
        return SavedState(
            weights=ShardReader(self.folder, "model"),
            optimizer=ShardReader(self.folder, "optimizer"),
            numbers=self.numbers,
        )

    def average(self) -> ShardReader:
        """The moving average of weights; without tensors if the run kept none."""
        return ShardReader(self.folder, "ema")


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, beside the training.

    Args:
        place: Where checkpoints go; the same for all ranks.
        keep: Newest checkpoints to keep.
        facts: See `Checkpoint`.
        world: The ranks.
    """

    def __init__(self, place: Place, *, keep: int, facts: Mapping[str, Any], world: World) -> None:
        self._place = place
        self._keep = keep
        self._facts = dict(facts)
        self._world = world
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._error: Exception | None = None
        self._step = 0

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the checkpoint in progress could not be written."""
        return self._error is not None

    def save(
        self,
        step: int,
        state: EngineState,
        *,
        ema: Mapping[str, Tensor] | None,
        memory: Mapping[str, Tensor],
    ) -> None:
        """Copy the state and begin to write it; all ranks call it.

        Raises:
            CheckpointError: If the checkpoint before, or this one's folder, could not be written;
                older checkpoints are untouched.
        """
        self.finish()
        self._step = step
        try:
            if self._world.is_main:
                self._place.begin(step)
        except (OSError, VlmError) as error:
            self._error = error
        self._raise_of_any_rank()
        kinds = {"model": state.weights, "optimizer": state.optimizer}
        if ema is not None:
            kinds["ema"] = own_pieces(ema, self._world)
        copies = {kind: snapshot(pieces) for kind, pieces in kinds.items()}
        kept = {name: tensor.detach().clone() for name, tensor in memory.items()}
        info = {"step": step, "facts": self._facts, "numbers": state.numbers}
        self._thread = threading.Thread(
            target=self._caught, args=(lambda: self._write(step, copies, kept, info), step)
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint in progress is in its place; all ranks call it.

        Raises:
            CheckpointError: If it could not be written; older checkpoints are untouched.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._raise_of_any_rank()

    def abandon(self) -> None:
        """Wait for this rank's own part alone, when the run ends by an error."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_of_any_rank(self) -> None:
        error, self._error = self._error, None
        if not any_rank(error is not None, self._world):
            return
        message = (
            f"{self._place.name_of(self._step)}: the checkpoint could not be saved "
            f"({error or 'another rank says why'}). Older checkpoints are intact; "
            f"{self._place.advice}"
        )
        raise CheckpointError(message) from error

    def _caught(self, write: Callable[[], None], step: int) -> None:
        try:
            write()
        except (OSError, RuntimeError, SafetensorError, VlmError) as error:
            self._error = error
            if self._world.is_main:
                self._place.give_up(step)
            else:
                self._try_to_tell(step)

    def _try_to_tell(self, step: int) -> None:
        try:
            self._place.hand_in(step, [], note=f"{_FAILED}{self._world.rank:05d}", text="")
        except (OSError, VlmError):
            return  # then rank 0 hears it when the ranks meet

    def _write(
        self,
        step: int,
        kinds: Mapping[str, Mapping[str, Piece]],
        memory: dict[str, Tensor],
        info: Mapping[str, Any],
    ) -> None:
        rank = f"{self._world.rank:05d}"
        draft = self._place.draft(step)
        paths = []
        for kind, pieces in kinds.items():
            paths.append(draft / f"{kind}-{rank}.safetensors")
            write_shard(paths[-1], pieces)
        if memory:
            paths.append(draft / f"memory-{rank}.safetensors")
            save_file(memory, paths[-1])
        written = {path.name: [path.stat().st_size, file_sha256(path)] for path in paths}
        self._place.hand_in(step, [*written], note=f"{_WRITTEN}{rank}", text=json.dumps(written))
        if self._world.is_main:
            files: dict[str, Any] = {}
            for name in self._parts_of_all_ranks(step):
                files |= json.loads(self._place.note(step, name))
            self._place.publish(step, json.dumps({**info, "files": files}, indent=2))
            for old in self._place.steps()[: -self._keep]:
                self._place.remove(old)

    def _parts_of_all_ranks(self, step: int) -> list[str]:
        deadline = time.monotonic() + _WAIT_SECONDS
        wanted = [f"{_WRITTEN}{rank:05d}" for rank in range(self._world.size)]
        while late := set(wanted) - (notes := self._place.notes(step)):
            failed = {note for note in notes if note.startswith(_FAILED)}
            if failed or self._given_up.is_set() or time.monotonic() > deadline:
                ranks = [int(note.rsplit("-", 1)[-1]) for note in sorted(failed or late)]
                message = f"no part of rank {', '.join(str(rank) for rank in ranks)}"
                raise OSError(message)
            time.sleep(self._place.pause_seconds)
        return wanted


@contextmanager
def open_writer(
    place: Place, *, keep: int, facts: Mapping[str, Any], world: World
) -> Iterator[CheckpointWriter]:
    """A `CheckpointWriter` that leaves no thread behind; call `finish` before the block ends."""
    writer = CheckpointWriter(place, keep=keep, facts=facts, world=world)
    try:
        yield writer
    finally:
        writer.abandon()


def latest_checkpoint(place: Place, *, check: bool = True) -> Checkpoint | None:
    """The newest checkpoint of which nothing is missing or altered, or none.

    Args:
        place: Of the checkpoints of a run.
        check: Read and compare every file; without it, the newest is believed.

    Raises:
        CheckpointError: If there are checkpoints, and all are damaged.
        StoreError: If a store does not answer.
    """
    damaged = []
    for step in reversed(place.steps()):
        try:
            return _open(place, step, check=check)
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise _none_left(place, damaged)
    return None


def set_aside_damaged(place: Place, world: World) -> list[str]:
    """Set damaged checkpoints aside that are newer than the last good one; all ranks call it.

    Returns:
        What was damaged, on rank 0.

    Raises:
        CheckpointError: If there are checkpoints, and all are damaged.
    """
    notes: list[str] = []
    steps = place.steps() if world.is_main else []
    for step in reversed(steps):
        try:
            _open(place, step, check=True)
            break
        except CheckpointError as error:
            notes.append(str(error))
    if any_rank(bool(steps) and len(notes) == len(steps), world):
        raise _none_left(place, notes)
    for step in steps[len(steps) - len(notes) :]:
        place.set_aside(step)
    barrier(world)
    return notes


def load_weights(checkpoint: Checkpoint, *, ema: bool) -> dict[str, Tensor] | None:
    """The weights of a checkpoint, or with `ema` their moving average, or none if it has none.

    Raises:
        CheckpointError: If a file is damaged.
    """
    reader = checkpoint.average() if ema else checkpoint.state().weights
    return {name: reader.whole(name) for name in reader.shapes} or None


def _none_left(place: Place, damage: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{place}: no checkpoint can be used; begin anew under another "
        f"name (name=...). {'; '.join(damage)}"
    )


def _open(place: Place, step: int, *, check: bool) -> Checkpoint:
    folder = place.fetch(step)
    path = folder / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        checkpoint = Checkpoint(
            folder=folder,
            step=int(info["step"]),
            facts=dict(info["facts"]),
            numbers=dict(info["numbers"]),
        )
        for name, (size, digest) in dict(info["files"]).items() if check else ():
            _check(folder / name, size, digest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}: damaged ({error})"
        raise CheckpointError(message) from error
    return checkpoint


def _check(path: Path, size: int, digest: str) -> None:
    found = path.stat().st_size
    if found != size:
        message = f"{path.name} has {found} bytes, not {size}"
        raise ValueError(message)
    if file_sha256(path) != digest:
        message = f"{path.name} was altered since it was written"
        raise ValueError(message)
