"""One self-contained page about a run, drawn anew while it trains."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jinja2
import yaml
from markupsafe import Markup

from vlm.files import write_text_whole
from vlm.train.curves import chart
from vlm.train.records import Run, read_run

__all__ = ["State", "write_run_report"]

State = Literal["running", "ended", "failed"]
"""`ended`: at its last step, or because somebody asked; `failed`: by an error."""

# Each chart with the figures it shows; a figure may stand for all that begin with it and "/".
_CHARTS = (
    ("loss", ("loss",)),
    ("temperature", ("temperature", "*/temperature")),
    ("learning rate", ("lr",)),
    ("gradient norm before clipping", ("gradient_norm",)),
    ("modality gap", ("modality_gap",)),
    ("spread above its floor (0 is even)", ("uniformity_above_floor",)),
    ("effective rank", ("effective_rank",)),
    ("samples a second", ("samples_per_second",)),
    ("model FLOP utilisation", ("mfu",)),
    ("waiting for data, fraction of time", ("data_wait_fraction",)),
    ("quarantined samples", ("quarantined",)),
    ("shares of sources", ("share",)),
)


def write_run_report(folder: Path, *, total_steps: int, state: State = "running") -> None:
    """Write `report.html` into a run folder; whole or not at all. A running one reloads itself."""
    run = read_run(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm.train", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    seconds = run.seconds()
    total = sum(seconds.values())
    step = int(run.last.get("step", 0))
    page = environment.get_template("run_report.html.j2").render(
        run=run,
        step=step,
        total_steps=total_steps,
        state=_told(state, is_whole=step >= total_steps),
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        headline=_headline(run),
        seconds={place: spent for place, spent in seconds.items() if spent >= 0.0005},
        total_seconds=total,
        charts=_charts(run),
        config=yaml.safe_dump(run.config, sort_keys=False),
    )
    write_text_whole(folder / "report.html", page)


def _headline(run: Run) -> list[tuple[str, str]]:
    last = run.last
    if not last:
        return []
    found = [("loss", f"{last['loss']:.3f}"), ("samples/s", f"{last['samples_per_second']:,.0f}")]
    goodput = run.goodput()
    if goodput is not None:
        found.append(("goodput", f"{goodput:.1%}"))
    if "mfu" in last:
        found.append(("MFU", f"{last['mfu']:.1%}"))
    found.append(("modality gap", f"{last['modality_gap']:.3f}"))
    found.append(("quarantined", f"{last.get('quarantined', 0):.0f}"))
    return found


def _charts(run: Run) -> list[tuple[str, Markup]]:
    names = list(dict.fromkeys(name for record in run.records for name in record))
    terms = [str(term["type"]) for term in run.config.get("loss", [])]
    chosen = [("terms of the loss", tuple(terms)) if len(terms) > 1 else ("", ()), *_CHARTS]
    drawn = []
    for title, figures in chosen:
        lines = {name: _line(run, name) for name in names if _belongs(name, figures)}
        if lines:
            drawn.append((title, chart(lines, label=title)))
    return drawn


def _belongs(name: str, figures: Sequence[str]) -> bool:
    for figure in figures:
        own = name.endswith(figure[1:]) if figure.startswith("*") else name == figure
        family = figure in ("gradient_norm", "uniformity_above_floor", "effective_rank", "share")
        if own or (family and name.startswith(f"{figure}/")):
            return True
    return False


def _line(run: Run, name: str) -> list[tuple[float, float]]:
    return [
        (float(record["step"]), float(record[name])) for record in run.records if name in record
    ]


def _told(state: State, *, is_whole: bool) -> str:
    if state == "ended":
        return "finished" if is_whole else "stopped"
    return "training" if state == "running" else "failed"
