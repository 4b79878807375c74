"""`vlm runs`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlm.errors import VlmError

if TYPE_CHECKING:
    from vlm.train.records import Run

__all__ = ["runs"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_COLUMNS = 40


def runs(
    names: Annotated[
        list[str] | None, typer.Argument(help="Runs to compare, by name or folder; none lists all.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where runs are.")] = Path("runs"),
) -> None:
    """List runs, or compare some: their settings, losses and speed."""
    from vlm.train.records import find_runs, read_run  # noqa: PLC0415 - torch costs seconds

    console = Console(highlight=False, markup=False)
    if not names:
        found = find_runs(folder)
        if not found:
            message = f"{folder}: no runs here; vlm train CONFIG makes one, or give --folder"
            raise VlmError(message)
        console.print(_overview(found))
        return
    chosen = [
        read_run(Path(name) if (Path(name) / "config.yaml").is_file() else folder / name)
        for name in names
    ]
    console.print(_overview(chosen))
    if len(chosen) > 1:
        console.print(_differences(chosen))
        console.print(_losses(chosen))
    for run in chosen:
        values = [record["loss"] for record in run.records]
        console.print(f"{run.name}: loss {_sparkline(values)}")


def _overview(found: "list[Run]") -> Table:
    table = Table(title="runs")
    table.add_column("name", overflow="fold")
    for name in ("step", "loss", "zero-shot", "samples/s", "goodput", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in found:
        last, goodput = run.last, run.goodput()
        table.add_row(
            run.name,
            f"{last['step']:,.0f}" if last else "-",
            f"{last['loss']:.3f}" if last else "-",
            _zero_shot(run.evaluation),
            f"{last['samples_per_second']:,.0f}" if last else "-",
            "-" if goodput is None else f"{goodput:.0%}",
            _age(time.time() - run.modified),
        )
    return table


def _zero_shot(evaluation: dict[str, Any] | None) -> str:
    """Top-1 of the first task, if the run was evaluated."""
    tasks = (evaluation or {}).get("zero_shot") or {}
    first = next(iter(tasks.values()), None)
    return "-" if first is None else f"{first['top1']:.1%}"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _differences(chosen: "list[Run]") -> Table:
    """Keys of the configuration that are not the same in all runs."""
    from vlm.train.records import flat  # noqa: PLC0415 - with torch

    trees = [flat(run.config) for run in chosen]
    table = Table("setting", title="settings that differ")
    for run in chosen:
        table.add_column(run.name, overflow="fold")
    for key in dict.fromkeys(key for tree in trees for key in tree):
        values = [tree.get(key, "-") for tree in trees]
        if key != "name" and any(value != values[0] for value in values):
            table.add_row(key, *(str(value) for value in values))
    return table


def _losses(chosen: "list[Run]") -> Table:
    """Losses at samples seen that all runs have passed."""
    table = Table(title="loss at equal samples")
    table.add_column("samples", justify="right")
    for run in chosen:
        table.add_column(run.name, justify="right")
    furthest = min((run.last.get("samples", 0) for run in chosen), default=0)
    for share in (0.1, 0.25, 0.5, 0.75, 1.0):
        row = []
        for run in chosen:
            passed = [r["loss"] for r in run.records if r["samples"] <= share * furthest]
            row.append(f"{passed[-1]:.3f}" if passed else "-")
        table.add_row(f"{share * furthest:,.0f}", *row)
    return table


def _sparkline(values: list[float]) -> str:
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return "-"
    stride = -(-len(finite) // _COLUMNS)
    shown = finite[::stride]
    low, high = min(shown), max(shown)
    height = (len(_BLOCKS) - 1) / ((high - low) or 1.0)
    return "".join(_BLOCKS[round((value - low) * height)] for value in shown)
