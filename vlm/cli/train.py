"""`vlm train`."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm.config import load_config

__all__ = ["train"]

RESUME_ME = 75  # EX_TEMPFAIL: a scheduler should start it again


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, e.g. configs/train/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted.key=value, e.g. optim.lr=3e-5")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint, if there is one.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks on this machine; by default one for each CUDA device."),
    ] = None,
    of: Annotated[
        int | None, typer.Option(hidden=True, help="How many were started so, for the advice.")
    ] = None,
) -> None:
    """Train the run that CONFIG describes; Ctrl-C saves a checkpoint and stops.

    It starts a rank for each device of this machine. Under torchrun every rank runs this same
    command.
    """
    from vlm.distributed import connected_world, ranks_to_start  # noqa: PLC0415 - torch costs seconds,
    from vlm.train import TrainConfig  # noqa: PLC0415 - which --help need not pay
    from vlm.train import train as run_training  # noqa: PLC0415 - with it

    settings = load_config(TrainConfig, config, overrides or [])
    count = ranks_to_start(processes)
    if count > 1:
        again = [str(config), *(overrides or []), *(["--resume"] if resume else [])]
        launch = ["-m", "vlm.distributed.launch", "--standalone", "--nproc-per-node", str(count)]
        os.execv(
            sys.executable,
            [sys.executable, *launch, "-m", "vlm", "train", *again, "--of", str(count)],
        )
    with connected_world(always_join=settings.engine.type != "torch") as world:
        console = Console(quiet=not world.is_main, soft_wrap=True)
        result = run_training(settings, world=world, console=console, resume=resume)
        if not result.finished:
            again = ["vlm", "train", str(config), *(overrides or []), "--resume"]
            again += [] if of is None else ["--processes", str(of)]
            command = shlex.join(again)
            console.print(f"continue with: {command}", highlight=False)
            raise typer.Exit(RESUME_ME)
        console.print(f"trained {result.step} steps: {settings.run_folder}", highlight=False)
