"""`vlm serve`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["serve"]


def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")] = Path("runs/demo/bundle"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings, e.g. max_batch=16")
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Folder of the collection; default: beside the bundle.")
    ] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
) -> None:
    """Serve the page and the API of BUNDLE until Ctrl-C."""
    from serving.__main__ import run  # noqa: PLC0415 - the `serve` extra may be missing
    from serving.settings import load_settings  # noqa: PLC0415 - with it
    from vlm.inference import read_bundle_info  # noqa: PLC0415 - torch costs seconds

    info = read_bundle_info(bundle)
    settings = load_settings(
        [
            f"bundle={bundle}",
            f"index={index or bundle.parent / 'index'}",
            f"host={host}",
            f"port={port}",
            *(overrides or []),
        ]
    )
    Console(soft_wrap=True).print(
        f"serving {info.name} ({info.fingerprint[:12]}) at http://{host}:{port}, "
        f"the API at http://{host}:{port}/docs; Ctrl-C ends it",
        highlight=False,
    )
    run(settings)
