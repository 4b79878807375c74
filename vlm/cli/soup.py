"""`vlm soup`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["soup"]


def soup(
    models: Annotated[
        list[Path], typer.Argument(help="Runs, bundles, or checkpoints of runs; two or more.")
    ],
    out: Annotated[Path, typer.Option(help="The new bundle's folder.")],
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="WiSE-FT: (1 - alpha) of the first, the start, and alpha of the other.",
        ),
    ] = None,
    shards: Annotated[
        list[Path] | None, typer.Option(help="Dataset folders for the modality means.")
    ] = None,
) -> None:
    """Average the weights of models of one architecture: evenly, or from a start to a tuned one."""
    from vlm.train.soup import make_soup  # noqa: PLC0415 - torch costs seconds

    info = make_soup(models, out, alpha=alpha, shards=shards or [])
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"bundle {info.fingerprint[:12]} written to {out}")
    if info.modality_means is None:
        console.print("it has no modality means; give --shards for them")
    console.print(f"judge it: vlm evaluate {out} TASKS.yaml --against {models[-1]}")
