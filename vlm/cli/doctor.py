"""`vlm doctor`."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm.config import load_config

__all__ = ["doctor"]

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    config: Annotated[Path, typer.Argument(help="A YAML file, as for vlm train.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value")] = None,
    world_size: Annotated[int, typer.Option(help="Ranks that the run will have.", min=1)] = 1,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of one rank, to estimate the cost.", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find out what would go wrong with a run, and what it will cost, before it starts.

    Exit code 1 if there is a problem.
    """
    from vlm.distributed import connected_world  # noqa: PLC0415 - torch costs seconds
    from vlm.train import TrainConfig  # noqa: PLC0415 - with it
    from vlm.train.doctor import examine  # noqa: PLC0415 - with it

    settings = load_config(TrainConfig, config, overrides or [])
    console = Console(soft_wrap=True, highlight=False)
    found = []
    with connected_world() as world, tempfile.TemporaryDirectory() as scratch:
        for finding in examine(
            settings,
            world=world,
            world_size=world_size,
            scratch=Path(scratch),
            price_per_hour=price_per_hour,
        ):
            found.append(finding)
            if not as_json:
                colour = _COLOURS[finding.verdict]
                console.print(f"[{colour}]{finding.verdict:8}[/] {finding.check}: ", end="")
                console.print(finding.text, markup=False)
                if finding.advice:
                    console.print(f"         → {finding.advice}", markup=False)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    if any(finding.verdict == "problem" for finding in found):
        raise typer.Exit(1)
