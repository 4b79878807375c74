"""`vlm bundle …`: bundles to and from object stores."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["app"]

app = typer.Typer(help="Move bundles to and from object stores, verified.")


@app.command()
def fetch(
    source: Annotated[str, typer.Argument(help="A URL (s3://, gs://, az://, https://) or folder.")],
    folder: Annotated[Path, typer.Argument(help="Where the bundle goes.")],
    fingerprint: Annotated[
        str | None, typer.Option(help="What it must have, all 64 digits; else nothing is kept.")
    ] = None,
) -> None:
    """Copy a bundle here, whole and verified, or not at all."""
    from vlm.inference import fetch_bundle  # noqa: PLC0415 - torch costs seconds

    info = fetch_bundle(source, folder, fingerprint=fingerprint)
    Console(soft_wrap=True).print(
        f"bundle {info.fingerprint} verified: {folder}", highlight=False, markup=False
    )


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A bundle, e.g. runs/x/bundle.")],
    target: Annotated[str, typer.Argument(help="Where it goes: a URL or a folder.")],
) -> None:
    """Copy a bundle to an object store; another bundle is never replaced."""
    from vlm.inference import push_bundle  # noqa: PLC0415 - torch costs seconds

    info = push_bundle(folder, target)
    Console(soft_wrap=True).print(
        f"bundle {info.fingerprint} pushed to {target}", highlight=False, markup=False
    )
