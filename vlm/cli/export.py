"""`vlm export`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="A run folder, e.g. runs/demo.")],
    out: Annotated[
        Path | None, typer.Option(help="The bundle's folder; RUN/bundle by default.")
    ] = None,
) -> None:
    """Write the bundle of RUN: weights, preprocessing, tokenizer, means, provenance, metrics."""
    from vlm.train.export import export_run  # noqa: PLC0415 - torch costs seconds

    console = Console(soft_wrap=True)
    folder = out if out is not None else run / "bundle"
    info = export_run(run, folder, console=console)
    console.print(f"bundle {info.fingerprint[:12]} written to {folder}", highlight=False)
