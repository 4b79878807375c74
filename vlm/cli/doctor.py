"""`vlm doctor`."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlm.config import load_config

if TYPE_CHECKING:
    from vlm.distributed import World
    from vlm.train import TrainConfig
    from vlm.train.doctor import Finding

__all__ = ["doctor"]

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    config: Annotated[Path, typer.Argument(help="A YAML file, as for vlm train.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value")] = None,
    world_size: Annotated[
        int | None, typer.Option(help="Ranks of the run; default: the manifests', or 1.", min=1)
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of one rank, to estimate the cost.", min=0)
    ] = None,
    manifests: Annotated[
        Path | None,
        typer.Option(help="Compare with a job: what vlm k8s render wrote, or a file of YAML."),
    ] = None,
    write_mb: Annotated[
        float | None,
        typer.Option(help="MB/s that the job's volume takes; default: as a disk here.", min=0.1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find out what would go wrong with a run, and what it will cost, before it starts.

    Exit code 1 if there is a problem.
    """
    from vlm.distributed import connected_world  # noqa: PLC0415 - torch costs seconds
    from vlm.train import TrainConfig  # noqa: PLC0415 - with it

    settings = load_config(TrainConfig, config, overrides or [])
    console = Console(soft_wrap=True, highlight=False)
    found = []
    with connected_world() as world, tempfile.TemporaryDirectory() as scratch:
        for finding in _findings(
            settings, world, Path(scratch), world_size, price_per_hour, manifests, write_mb
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


def _findings(
    config: "TrainConfig",
    world: "World",
    scratch: Path,
    world_size: int | None,
    price_per_hour: float | None,
    manifests: Path | None,
    write_mb: float | None,
) -> "Iterator[Finding]":
    from vlm.cli.k8s_check import check_pods, check_sizes, write_speed  # noqa: PLC0415 - with it
    from vlm.cli.k8s_read import read_pods  # noqa: PLC0415 - with it
    from vlm.train.doctor import examine  # noqa: PLC0415 - torch costs seconds

    pods = None if manifests is None else read_pods(manifests)
    if pods is not None:
        yield from check_pods(pods, config, world_size=world_size)
    ranks = world_size or (1 if pods is None else pods.ranks)
    figures = {}
    for finding in examine(
        config, world=world, world_size=ranks, scratch=scratch, price_per_hour=price_per_hour
    ):
        figures[finding.check] = finding.figures
        yield finding
    if pods is not None:
        speed = write_speed(scratch) if write_mb is None else write_mb * 1e6
        on_gpu = world.device.type != "cpu"
        yield from check_sizes(pods, config, figures, on_gpu=on_gpu, bytes_per_second=speed)
