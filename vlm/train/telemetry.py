"""What a run says while it works: a live line in a terminal, plain lines elsewhere, and files.

`metrics.jsonl` gets one JSON object every `log_every` steps, whatever the terminal shows, and
`report.html` is drawn anew from it every half minute. `Telemetry` also keeps the ledger of time.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from vlm.distributed import World
from vlm.train.config import TrainConfig
from vlm.train.flops import flops_per_sample, peak_flops
from vlm.train.ledger import Ledger
from vlm.train.records import SECONDS
from vlm.train.run_report import State, write_run_report
from vlm.train.sinks import Sink, open_sinks
from vlm.types import Batch

__all__ = ["Telemetry", "open_telemetry"]


class Telemetry:
    """Counts steps and seconds, and reports figures.

    Args:
        console: Where people read; silent on ranks other than 0.
        config: The run.
        world: The ranks; rank 0 alone writes.
        start_step: Steps done before.
        total_steps: Steps of the whole run.
        started: When the run's time begins, by `time.monotonic`; none: now.
    """

    def __init__(
        self,
        console: Console,
        config: TrainConfig,
        world: World,
        *,
        start_step: int,
        total_steps: int,
        started: float | None = None,
    ) -> None:
        self._console = console
        self._total_steps = total_steps
        self._global_batch = config.global_batch
        self._ledger = Ledger(communicated=lambda: world.waited.seconds, started=started)
        self._folder = config.run_folder if world.is_main else None
        self._page_every = config.telemetry.page_every_seconds
        self._page_due = 0.0
        self._sinks: list[Sink] = []
        self._flops_share = None  # of the peak of all devices, at one sample a second
        if world.is_main:
            settings = config.model_dump(mode="json")
            self._sinks = open_sinks(config.telemetry, config.run_folder, settings)
            self._flops_share = _flops_share(config, world)
        self._profiler = _Profiler(config, world)
        self._window_step = start_step
        self._window_start = time.monotonic()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal and not console.quiet:
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

    def enter(self, place: str) -> None:
        """From now on time goes to this place of `vlm.train.ledger`."""
        self._ledger.enter(place)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; waiting for one is time for data, and what follows is compute."""
        while True:
            self._ledger.enter("data")
            batch = next(batches, None)
            if batch is None:
                self._ledger.enter("stalls")
                return
            self._ledger.enter("compute")
            self._profiler.step()
            yield batch

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Record the figures of the last step, and rates and seconds since the last report."""
        self._ledger.enter("stalls")
        elapsed = max(time.monotonic() - self._window_start, 1e-9)
        steps = max(step - self._window_step, 1)
        rate = steps * self._global_batch / elapsed
        seconds = self._note_seconds(step)
        self._window_step, self._window_start = step, time.monotonic()
        record = {
            "step": step,
            "samples": step * self._global_batch,
            **{name: round(value, 6) for name, value in figures.items()},
            "samples_per_second": round(rate, 1),
            "data_wait_fraction": round(min(seconds["data"] / elapsed, 1.0), 4),
            "goodput": round(seconds["compute"] / max(sum(seconds.values()), 1e-9), 4),
        }
        if self._flops_share is not None:
            record["mfu"] = round(rate * self._flops_share, 5)
        for sink in self._sinks:
            sink.write(record)
        if self._folder is not None and time.monotonic() >= self._page_due:
            write_run_report(self._folder, total_steps=self._total_steps)
            self._page_due = time.monotonic() + self._page_every
        remaining = (self._total_steps - step) * elapsed / steps
        self._show(step, _line(figures, rate, remaining))

    def note(self, text: str) -> None:
        """Say one thing outside the regular figures."""
        self._console.print(text, highlight=False)

    def close(self, state: State = "ended") -> None:
        """Leave the terminal as it was, and the page as it will stay."""
        self._note_seconds(self._window_step)
        self._profiler.stop()
        if self._progress is not None:
            self._progress.stop()
        for sink in self._sinks:
            sink.close()
        if self._folder is not None:
            write_run_report(self._folder, total_steps=self._total_steps, state=state)

    def _note_seconds(self, step: int) -> dict[str, float]:
        """Write the seconds since the last time into the ledger's file, and return them."""
        seconds = self._ledger.take()
        if self._folder is not None and any(seconds.values()):
            line = {"step": step, **{place: round(s, 4) for place, s in seconds.items()}}
            with (self._folder / SECONDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return seconds

    def _show(self, step: int, line: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=line)
        else:
            self._console.print(f"step {step}/{self._total_steps} {line}", highlight=False)


class _Profiler:
    """Traces a window of steps, if the run asks for it."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self._window = config.telemetry.profile
        self._path = config.run_folder / f"trace-rank{world.rank}.json"
        self._step = 0
        self._trace: torch.profiler.profile | None = None

    def step(self) -> None:
        """Call at the beginning of every step."""
        self._step += 1
        if self._window is None:
            return
        if self._trace is None and self._step == self._window.from_step:
            self._trace = torch.profiler.profile()
            self._trace.start()
        elif self._step == self._window.from_step + self._window.steps:
            self.stop()

    def stop(self) -> None:
        if self._trace is not None:
            self._trace.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._trace.export_chrome_trace(str(self._path))
            self._trace = None


@contextmanager
def open_telemetry(
    console: Console,
    config: TrainConfig,
    world: World,
    *,
    start_step: int,
    total_steps: int,
    started: float | None = None,
) -> Iterator[Telemetry]:
    """A `Telemetry` that is closed at the end; see there for the arguments."""
    telemetry = Telemetry(
        console, config, world, start_step=start_step, total_steps=total_steps, started=started
    )
    try:
        yield telemetry
    except BaseException:
        telemetry.close("failed")
        raise
    telemetry.close()


def _flops_share(config: TrainConfig, world: World) -> float | None:
    """What one sample a second is of the FLOP/s of all devices, or none if they are not known."""
    given = config.telemetry.peak_tflops
    peak = given * 1e12 if given is not None else peak_flops(world.device)
    return None if peak is None else flops_per_sample(config) / (peak * world.size)


def _line(figures: Mapping[str, float], rate: float, remaining_seconds: float) -> str:
    minutes, seconds = divmod(round(remaining_seconds), 60)
    return (
        f"loss {figures['loss']:.3f}  temperature {1 / figures['logit_scale']:.4f}  "
        f"gap {figures['modality_gap']:.3f}  {rate:.0f} samples/s  ETA {minutes}:{seconds:02d}"
    )
