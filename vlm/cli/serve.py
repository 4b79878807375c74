"""`vlm serve`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm.files import is_url

__all__ = ["bundle_folder", "serve"]


def serve(
    bundle: Annotated[
        str,
        typer.Argument(
            help="A bundle (folder or s3://… URL), local-dir:FOLDER, or open_clip:ARCH/TAG."
        ),
    ] = "runs/demo/bundle",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings, e.g. max_batch=16")
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Folder of the collection; default: beside the bundle.")
    ] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
) -> None:
    """Serve the page and the API of BUNDLE until Ctrl-C.

    A model of open_clip is first made a bundle, in runs/NAME/bundle.
    """
    from serving.__main__ import run  # noqa: PLC0415 - the `serve` extra may be missing
    from serving.settings import load_settings  # noqa: PLC0415 - with it
    from vlm.inference import read_bundle_info  # noqa: PLC0415 - torch costs seconds

    folder = bundle_folder(bundle)
    info = read_bundle_info(folder)
    home = Path("runs") / bundle.rstrip("/").rsplit("/", 1)[-1] if is_url(bundle) else folder.parent
    settings = load_settings(
        [
            f"bundle={folder}",
            f"index={index or home / 'index'}",
            f"host={host}",
            f"port={port}",
            *(overrides or []),
        ]
    )
    Console(soft_wrap=True).print(
        f"starting {info.name} ({info.fingerprint[:12]}) for http://{host}:{port}, "
        f"the API at http://{host}:{port}/docs; Ctrl-C ends it",
        highlight=False,
    )
    run(settings)


def bundle_folder(source: str) -> Path:
    """The folder itself, or where a bundle was fetched to or made of an open_clip model.

    Raises:
        BundleError: If the model cannot be had, or bundles cannot hold it.
        StoreError: If an object store does not answer.
    """
    from vlm.inference import cached_bundle  # noqa: PLC0415 - torch costs seconds
    from vlm.inference.open_clip_source import (  # noqa: PLC0415 - torch costs seconds
        import_open_clip,
        is_open_clip_source,
        open_clip_name,
    )

    if is_url(source):
        return cached_bundle(source, Path("~/.cache/vlm/bundles").expanduser())
    if not is_open_clip_source(source):
        return Path(source)
    folder = Path("runs") / open_clip_name(source) / "bundle"
    import_open_clip(source, folder)
    return folder
