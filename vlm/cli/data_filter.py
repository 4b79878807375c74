"""`vlm data filter`."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vlm.cli.progress import StageProgress
from vlm.config import load_config

__all__ = ["filter_dataset"]

_SECONDS_BETWEEN_LINES = 2.0


def filter_dataset(
    folder: Annotated[Path, typer.Argument(help="An indexed folder of shards.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted.key=value, e.g. min_side=128")
    ] = None,
    config: Annotated[Path, typer.Option(help="A YAML file of rules.")] = Path(
        "configs/data/filter.yaml"
    ),
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: all cores.", min=1)
    ] = None,
) -> None:
    """Judge every sample by rules, and write which rows are kept; the shards stay as they are."""
    from vlm.data.filter import FilterConfig, build_filter  # noqa: PLC0415 - numpy
    from vlm.preprocess import DEFAULT_MAX_PIXELS, decode_picture  # noqa: PLC0415 - torch

    settings = load_config(FilterConfig, config, overrides or [])
    console = Console(soft_wrap=True, highlight=False, markup=False)
    report = build_filter(
        folder,
        settings,
        decode=partial(decode_picture, max_pixels=DEFAULT_MAX_PIXELS),
        workers=workers or os.cpu_count() or 1,
        progress=StageProgress(console, every_seconds=_SECONDS_BETWEEN_LINES),
    )
    table = Table("rule", "drops", "share")
    for name, count in report.dropped.items():
        table.add_row(name, f"{count}", f"{count / report.num_samples:.2%}")
    table.add_section()
    table.add_row("kept", f"{report.num_kept}", f"{report.num_kept / report.num_samples:.2%}")
    console.print(table)
    console.print(f"{report.num_kept} of {report.num_samples} samples kept: {report.path}")
