"""`vlm serve`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm.files import is_url

__all__ = ["bundle_folder", "serve"]


def serve(
    bundle: Annotated[
        str | None,
        typer.Argument(
            help="A bundle (folder or s3://… URL), local-dir:FOLDER, or open_clip:ARCH/TAG.",
            show_default="that of the settings, else runs/demo/bundle",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings, e.g. max_batch=16")
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Folder of the collection; default: beside the bundle.")
    ] = None,
    host: Annotated[str | None, typer.Option(show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, show_default="8000")] = None,
) -> None:
    """Serve the page and the API of BUNDLE until Ctrl-C.

    What is not given here is taken from the file that VLM_SERVING_CONFIG names, if it is set. A
    model of open_clip is first made a bundle, in runs/NAME/bundle.
    """
    from serving.__main__ import run  # noqa: PLC0415 - the `serve` extra may be missing
    from serving.settings import load_settings  # noqa: PLC0415 - with it
    from vlm.inference import read_bundle_info  # noqa: PLC0415 - torch costs seconds

    given = {"bundle": bundle, "index": index, "host": host, "port": port}
    flags = [f"{name}={value}" for name, value in given.items() if value is not None]
    settings = load_settings([*flags, *(overrides or [])])
    source = str(settings.bundle)
    folder = bundle_folder(source, settings.bundle_cache.expanduser())
    info = read_bundle_info(folder)
    home = Path("runs") / source.rstrip("/").rsplit("/", 1)[-1] if is_url(source) else folder.parent
    collection = settings.index if "index" in settings.model_fields_set else home / "index"
    settings = settings.model_copy(update={"bundle": folder, "index": collection})
    address = f"http://{settings.host}:{settings.port}"
    Console(soft_wrap=True).print(
        f"starting {info.name} ({info.fingerprint[:12]}) for {address}, "
        f"the API at {address}/docs; Ctrl-C ends it",
        highlight=False,
    )
    run(settings)


def bundle_folder(source: str, cache: Path) -> Path:
    """The folder itself, or where a bundle was fetched to or made of an open_clip model.

    Args:
        source: A folder, a URL, or a model of open_clip.
        cache: Of bundles that were fetched.

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
        return cached_bundle(source, cache)
    if not is_open_clip_source(source):
        return Path(source)
    folder = Path("runs") / open_clip_name(source) / "bundle"
    import_open_clip(source, folder)
    return folder
