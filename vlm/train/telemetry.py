"""What a run says while it works: a live line in a terminal, plain lines elsewhere, and a file.

`metrics.jsonl` gets one JSON object every `log_every` steps, whatever the terminal shows.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from vlm.files import write_text_whole

__all__ = ["Telemetry", "open_telemetry", "truncate_metrics"]


class Telemetry:
    """Counts steps and waiting, and reports figures.

    Args:
        console: Where people read; silent on ranks other than 0.
        metrics: The JSON-lines file, or none on ranks other than 0.
        start_step: Steps done before.
        total_steps: Steps of the whole run.
        global_batch: Samples a step, over all ranks.
    """

    def __init__(
        self,
        console: Console,
        metrics: Path | None,
        *,
        start_step: int,
        total_steps: int,
        global_batch: int,
    ) -> None:
        self._console = console
        self._metrics = metrics
        self._total_steps = total_steps
        self._global_batch = global_batch
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._window_step = start_step
        self._window_start = time.monotonic()
        self._waited_seconds = 0.0
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[figures]}"),
                console=console,
            )
            self._task = self._progress.add_task(
                "training", total=total_steps, completed=start_step, figures=""
            )
            self._progress.start()

    def waited(self, seconds: float) -> None:
        """Count time that the step spent waiting for data."""
        self._waited_seconds += seconds

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Record the figures of the last step and the rates since the last report."""
        elapsed = max(time.monotonic() - self._window_start, 1e-9)
        steps = max(step - self._window_step, 1)
        rate = steps * self._global_batch / elapsed
        record = {
            "step": step,
            "samples": step * self._global_batch,
            **{name: round(value, 6) for name, value in figures.items()},
            "samples_per_second": round(rate, 1),
            "data_wait_fraction": round(min(self._waited_seconds / elapsed, 1.0), 4),
        }
        if self._metrics is not None:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        remaining = (self._total_steps - step) * elapsed / steps
        self._show(step, _line(figures, rate, remaining))
        self._window_step, self._window_start = step, time.monotonic()
        self._waited_seconds = 0.0

    def note(self, text: str) -> None:
        """Say one thing outside the regular figures."""
        self._console.print(text, highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _show(self, step: int, line: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=line)
        else:
            self._console.print(f"step {step}/{self._total_steps} {line}", highlight=False)


@contextmanager
def open_telemetry(
    console: Console,
    metrics: Path | None,
    *,
    start_step: int,
    total_steps: int,
    global_batch: int,
) -> Iterator[Telemetry]:
    """A `Telemetry` that leaves the terminal as it found it; see there for the arguments."""
    telemetry = Telemetry(
        console,
        metrics,
        start_step=start_step,
        total_steps=total_steps,
        global_batch=global_batch,
    )
    try:
        yield telemetry
    finally:
        telemetry.close()


def truncate_metrics(path: Path, step: int) -> None:
    """Drop records after `step`, which a resumed run will write again, and any torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    write_text_whole(path, "".join(kept))


def _line(figures: Mapping[str, float], rate: float, remaining_seconds: float) -> str:
    minutes, seconds = divmod(round(remaining_seconds), 60)
    return (
        f"loss {figures['loss']:.3f}  temperature {1 / figures['logit_scale']:.4f}  "
        f"gap {figures['modality_gap']:.3f}  {rate:.0f} samples/s  ETA {minutes}:{seconds:02d}"
    )
