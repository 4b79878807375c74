"""When a run goes wrong: what counts as a fault, and which steps are left out because of it."""

import errno
import json
import math
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from vlm.errors import CheckpointError, VlmError
from vlm.files import write_text_whole
from vlm.train.config import RecoveryConfig

__all__ = ["SKIPPED", "FaultWatch", "SkippedWindow", "SkippedWindows", "advice", "disk_faults_told"]

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
SKIPPED = "skipped_windows.jsonl"
"""In the run's folder."""
_HISTORY = 100
_ENOUGH = 20
"""Norms before a leap can be told from the ordinary."""


class FaultWatch:
    """Looks at the figures of every step.

    Args:
        config: What counts as a fault.
        overflows: Whether the engine itself skips steps whose scaled gradients overflow.
    """

    def __init__(self, config: RecoveryConfig, *, overflows: bool) -> None:
        self._factor = config.spike_factor
        self._overflows = overflows
        self._norms: deque[float] = deque(maxlen=_HISTORY)

    def fault(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step, or nothing."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return None if self._overflows else f"the gradient's norm is {gradient_norm}"
        if self._factor is not None and len(self._norms) >= _ENOUGH:
            usual = statistics.median(self._norms)
            if gradient_norm > self._factor * usual:
                return f"the gradient's norm leapt from {usual:.4g} to {gradient_norm:.4g}"
        self._norms.append(gradient_norm)
        return None


@dataclass(frozen=True, kw_only=True)
class SkippedWindow:
    """Steps that are not trained on, counted from 0."""

    first_step: int
    last_step: int
    reason: str


def advice(precision: str) -> str:
    """What a person can change when a run goes wrong over and over."""
    ways = ["Lower optim.lr", "lengthen the warm-up"]
    if precision != "fp32":
        ways.append("use engine.precision=fp32")
    return f"{', '.join(ways[:-1])} or {ways[-1]}, then start a run of another name"


class SkippedWindows:
    """The steps a run leaves out, kept in a file so that a resumed run leaves out the same.

    Args:
        path: `skipped_windows.jsonl` in the run's folder.
        config: The budget, and the size of a window.
        precision: Of the run; what is in fp32 is not told to go there.

    Raises:
        CheckpointError: If the file cannot be read.
    """

    def __init__(self, path: Path, config: RecoveryConfig, *, precision: str) -> None:
        self._path = path
        self._config = config
        self._advice = advice(precision)
        self._windows: list[SkippedWindow] = []
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            self._windows = [SkippedWindow(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            message = f"{path}: damaged ({error}); without it the run would not repeat itself"
            raise CheckpointError(message) from error

    def cover(self, step: int) -> bool:
        """Whether this step, counted from 0, is left out."""
        return any(window.first_step <= step <= window.last_step for window in self._windows)

    def add(self, step: int, reason: str, *, write: bool) -> SkippedWindow:
        """Leave out the steps up to one that went wrong; `write` on one rank alone.

        Raises:
            VlmError: If the budget is used up.
        """
        if len(self._windows) >= self._config.max_rollbacks:
            message = (
                f"{self._path.parent}: {reason} at step {step + 1}, and the run has been rolled "
                f"back {len(self._windows)} times, as often as recovery.max_rollbacks allows. "
                f"{self._advice}"
            )
            raise VlmError(message)
        first = max(0, step - self._config.skip_steps + 1)
        window = SkippedWindow(first_step=first, last_step=step, reason=reason)
        self._windows.append(window)
        if write:
            lines = [json.dumps(asdict(known)) + "\n" for known in self._windows]
            write_text_whole(self._path, "".join(lines))
        return window


@contextmanager
def disk_faults_told(folder: Path) -> Iterator[None]:
    """Turn what the disk of a run's folder does not allow into an error for people.

    Raises:
        CheckpointError: In place of an `OSError` of a full or read-only disk, or about the folder.
    """
    try:
        yield
    except OSError as error:
        name = Path(error.filename) if isinstance(error.filename, str) else None
        about = name is not None and (name.is_relative_to(folder) or folder.is_relative_to(name))
        if error.errno not in _OF_DISKS and not about:
            raise
        message = (
            f"{name or folder}: cannot be written ({error.strerror}). Checkpoints so far are "
            f"intact; free some space, or set `output` to a folder that can be written, and go on "
            f"with --resume"
        )
        raise CheckpointError(message) from error
