"""`vlm train`."""

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
) -> None:
    """Train the run that CONFIG describes; Ctrl-C saves a checkpoint and stops.

    Under torchrun every rank runs this same command.
    """
    from vlm.distributed import connected_world  # noqa: PLC0415 - torch costs seconds,
    from vlm.train import TrainConfig  # noqa: PLC0415 - which --help need not pay
    from vlm.train import train as run_training  # noqa: PLC0415 - with it

    settings = load_config(TrainConfig, config, overrides or [])
    with connected_world(always_join=settings.engine.type != "torch") as world:
        console = Console(quiet=not world.is_main, soft_wrap=True)
        result = run_training(settings, world=world, console=console, resume=resume)
        if not result.finished:
            console.print(f"continue with: vlm train {config} --resume", highlight=False)
            raise typer.Exit(RESUME_ME)
        console.print(f"trained {result.step} steps: {settings.run_folder}", highlight=False)
