"""Checkpoints: written while training goes on, whole or not at all, and never unpickled.

    runs/<name>/checkpoints/step-00000500/
        model-NNNNN.safetensors      weights, the part of each rank; see `shards.py`
        ema-NNNNN.safetensors        moving average of the weights, if the run keeps one
        optimizer-NNNNN.safetensors  what the optimizer keeps of each parameter
        memory-NNNNN.safetensors     what loss terms remember, if they do
        checkpoint.json              step, what the run was made of, size and hash of every file

Every rank copies its part to main memory and goes on training; a thread writes it under a hidden
name. When the parts of all ranks are there, rank 0 renames the folder, so a crash while saving
never costs the last good one. A checkpoint with a missing or altered file is set aside for the one
before it. The data position is the step; randomness is keyed by it.
"""

import json
import shutil
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
from vlm.errors import CheckpointError
from vlm.files import file_sha256, write_text_whole
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

_INFO: Final = "checkpoint.json"
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
        folder: Where `step-NNNNNNNN` folders go; the same for all ranks.
        keep: Newest checkpoints to keep.
        facts: See `Checkpoint`.
        world: The ranks.
    """

    def __init__(self, folder: Path, *, keep: int, facts: Mapping[str, Any], world: World) -> None:
        self._folder = folder
        self._keep = keep
        self._facts = dict(facts)
        self._world = world
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._error: Exception | None = None
        self._final = folder

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
        self._final = self._folder / f"step-{step:08d}"
        draft = self._folder / f".draft-{step:08d}"
        try:
            if self._world.is_main:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
        except OSError as error:
            self._error = error
        self._raise_of_any_rank()
        kinds = {"model": state.weights, "optimizer": state.optimizer}
        if ema is not None:
            kinds["ema"] = own_pieces(ema, self._world)
        copies = {kind: snapshot(pieces) for kind, pieces in kinds.items()}
        kept = {name: tensor.detach().clone() for name, tensor in memory.items()}
        info = {"step": step, "facts": self._facts, "numbers": state.numbers}
        self._thread = threading.Thread(
            target=self._caught, args=(lambda: self._write(draft, copies, kept, info), draft)
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
            f"{self._final}: the checkpoint could not be saved "
            f"({error or 'another rank says why'}). Older checkpoints are intact; free some space "
            f"or set `output` to another disk, then resume"
        )
        raise CheckpointError(message) from error

    def _caught(self, write: Callable[[], None], draft: Path) -> None:
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:
            self._error = error
            if self._world.is_main:
                shutil.rmtree(draft, ignore_errors=True)
            else:
                _try_to_tell(draft / f"failed-{self._world.rank:05d}")

    def _write(
        self,
        draft: Path,
        kinds: Mapping[str, Mapping[str, Piece]],
        memory: dict[str, Tensor],
        info: Mapping[str, Any],
    ) -> None:
        rank = f"{self._world.rank:05d}"
        paths = []
        for kind, pieces in kinds.items():
            paths.append(draft / f"{kind}-{rank}.safetensors")
            write_shard(paths[-1], pieces)
        if memory:
            paths.append(draft / f"memory-{rank}.safetensors")
            save_file(memory, paths[-1])
        written = {path.name: [path.stat().st_size, file_sha256(path)] for path in paths}
        write_text_whole(draft / f"written-{rank}.json", json.dumps(written))
        if self._world.is_main:
            self._publish(draft, info)

    def _publish(self, draft: Path, info: Mapping[str, Any]) -> None:
        files: dict[str, Any] = {}
        for path in _parts_of_all_ranks(draft, self._world.size, self._given_up):
            files |= json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
        write_text_whole(draft / _INFO, json.dumps({**info, "files": files}, indent=2))
        shutil.rmtree(self._final, ignore_errors=True)
        draft.rename(self._final)
        for old in _complete(self._folder)[: -self._keep]:
            shutil.rmtree(old)


@contextmanager
def open_writer(
    folder: Path, *, keep: int, facts: Mapping[str, Any], world: World
) -> Iterator[CheckpointWriter]:
    """A `CheckpointWriter` that leaves no thread behind; call `finish` before the block ends."""
    writer = CheckpointWriter(folder, keep=keep, facts=facts, world=world)
    try:
        yield writer
    finally:
        writer.abandon()


def _parts_of_all_ranks(draft: Path, size: int, given_up: threading.Event) -> list[Path]:
    deadline = time.monotonic() + _WAIT_SECONDS
    paths = [draft / f"written-{rank:05d}.json" for rank in range(size)]
    while not all(path.is_file() for path in paths):
        failed = sorted(draft.glob("failed-*"))
        late = [path.stem.removeprefix("written-") for path in paths if not path.is_file()]
        if failed or given_up.is_set() or time.monotonic() > deadline:
            who = [path.name.removeprefix("failed-") for path in failed] or late
            message = f"no part of rank {', '.join(str(int(rank)) for rank in who)}"
            raise OSError(message)
        time.sleep(0.01)
    return paths


def _try_to_tell(path: Path) -> None:
    try:
        path.touch()
    except OSError:
        return  # then rank 0 hears it when the ranks meet


def latest_checkpoint(folder: Path, *, check: bool = True) -> Checkpoint | None:
    """The newest checkpoint of which nothing is missing or altered, or none.

    Args:
        folder: Of the checkpoints of a run.
        check: Read and compare every file; without it, the newest is believed.

    Raises:
        CheckpointError: If there are checkpoints, and all are damaged.
    """
    damaged = []
    for path in reversed(_complete(folder)):
        try:
            return _open(path, check=check)
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        message = f"{folder}: no checkpoint can be used. {'; '.join(damaged)}"
        raise CheckpointError(message)
    return None


def set_aside_damaged(folder: Path, world: World) -> list[str]:
    """Rename damaged checkpoints that are newer than the last good one; all ranks call it.

    Returns:
        What was damaged, on rank 0.

    Raises:
        CheckpointError: If there are checkpoints, and all are damaged.
    """
    notes: list[str] = []
    paths = _complete(folder) if world.is_main else []
    for path in reversed(paths):
        try:
            _open(path, check=True)
            break
        except CheckpointError as error:
            notes.append(str(error))
    if any_rank(bool(paths) and len(notes) == len(paths), world):
        message = f"{folder}: no checkpoint can be used. {'; '.join(notes)}"
        raise CheckpointError(message)
    for path in paths[len(paths) - len(notes) :]:
        aside = folder / path.name.replace("step-", "damaged-")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    barrier(world)
    return notes


def load_weights(checkpoint: Checkpoint, *, ema: bool) -> dict[str, Tensor] | None:
    """The weights of a checkpoint, or with `ema` their moving average, or none if it has none.

    Raises:
        CheckpointError: If a file is damaged.
    """
    reader = checkpoint.average() if ema else checkpoint.state().weights
    return {name: reader.whole(name) for name in reader.shapes} or None


def _open(folder: Path, *, check: bool) -> Checkpoint:
    path = folder / _INFO
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
        message = f"{path}: damaged ({error}); remove {folder} to use an older one"
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


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"step-*/{_INFO}"))
