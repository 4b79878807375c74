"""`vlm data filter`."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vlm.cli.progress import StageProgress, terminated_as_interrupted
from vlm.config import load_config
from vlm.files import is_url

__all__ = ["filter_dataset"]

_SECONDS_BETWEEN_LINES = 2.0


def filter_dataset(
    location: Annotated[str, typer.Argument(help="An indexed folder of shards, or its URL.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted.key=value, e.g. min_side=128")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A YAML file of rules, as configs/data/filter.yaml; default: none."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the filter goes; default: FOLDER/filters.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: all cores.", min=1)
    ] = None,
) -> None:
    """Judge every sample by rules, and write which rows are kept; the shards stay as they are."""
    from vlm.data.filter import FilterConfig, build_filter  # noqa: PLC0415 - numpy
    from vlm.preprocess import DEFAULT_MAX_PIXELS, decode_picture  # noqa: PLC0415 - torch

    settings = load_config(FilterConfig, config, overrides or [])
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with terminated_as_interrupted():
        report = build_filter(
            location,
            settings,
            decode=partial(decode_picture, max_pixels=DEFAULT_MAX_PIXELS),
            target=out,
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
    if is_url(location):
        mark = report.path.with_suffix(".json")
        console.print(f"to train with it, upload it and {mark} to {location.rstrip('/')}/filters")
