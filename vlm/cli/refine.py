"""`vlm refine`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm.cli.train import RESUME_ME
from vlm.config import apply_overrides, validate_config

__all__ = ["refine"]


def refine(
    model: Annotated[Path, typer.Argument(help="A run, a bundle, or a checkpoint of a run.")],
    shards: Annotated[Path, typer.Option(help="Dataset folder of pairs to refine on.")],
    out: Annotated[Path, typer.Option(help="The new bundle's folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="lr=1e-6 batch=512 weight_decay=0.1 alpha=0.5 …")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, …")] = "cpu",
) -> None:
    """Narrow the modality gap of a trained dual encoder: CLIP-Refine, one epoch over pairs.

    Ctrl-C saves the progress; the same command goes on from there.
    """
    from vlm.cli.device import usable_device  # noqa: PLC0415 - torch costs seconds
    from vlm.train.refine import RefineConfig  # noqa: PLC0415 - torch costs seconds
    from vlm.train.refine import refine as run  # noqa: PLC0415 - with it
    from vlm.train.signals import stop_on_signal  # noqa: PLC0415 - with it

    config = validate_config(
        RefineConfig, apply_overrides({}, overrides or []), source="vlm refine"
    )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with stop_on_signal() as stop:
        info = run(
            model, shards, out, config, device=usable_device(device), say=console.print, stop=stop
        )
    if info is None:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(RESUME_ME)
    console.print(f"bundle {info.fingerprint[:12]} written to {out}")
    console.print(f"judge it: vlm evaluate {out} TASKS.yaml --against {model}")
