"""`vlm index`."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlm.errors import DataError

if TYPE_CHECKING:
    from serving.services.indexing import Pair

__all__ = ["index"]


def index(
    shards: Annotated[list[Path], typer.Argument(help="Dataset folders.")],
    bundle: Annotated[Path, typer.Option(help="The model.")] = Path("runs/demo/bundle"),
    index: Annotated[
        Path | None, typer.Option(help="Folder of the collection; default: beside the bundle.")
    ] = None,
) -> None:
    """Embed the images of datasets and make them searchable; run again, it goes on."""
    from serving.errors import FingerprintError  # noqa: PLC0415 - `serve` extra
    from serving.services.indexing import index_pairs  # noqa: PLC0415 - `serve` extra
    from serving.stores import EmbeddedStore  # noqa: PLC0415 - `serve` extra
    from vlm.data.manifest import open_manifest  # noqa: PLC0415 - numpy
    from vlm.inference import Encoder  # noqa: PLC0415 - torch costs seconds

    console = Console(soft_wrap=True)
    total = sum(open_manifest(folder).num_samples for folder in shards)
    encoder = Encoder.load(bundle)
    folder = index or bundle.parent / "index"
    try:
        store = EmbeddedStore(folder, fingerprint=encoder.fingerprint, dim=encoder.dim)
    except FingerprintError as error:
        raise DataError(str(error)) from error
    start = last = time.monotonic()

    def report(stored: int, skipped: int) -> None:
        nonlocal last
        done, now = stored + skipped, time.monotonic()
        if now - last < 2 and done < total:
            return
        last = now
        rate = done / max(now - start, 1e-9)
        console.print(
            f"{done}/{total} images, {rate:.0f} images/s, ETA {(total - done) / rate:.0f} s",
            highlight=False,
        )

    stored, skipped = index_pairs(encoder, store, _pairs(shards), progress=report)
    console.print(
        f"{stored} images indexed, {skipped} were there already: {folder}", highlight=False
    )


def _pairs(shards: list[Path]) -> "Iterator[Pair]":
    from serving.services.indexing import Pair  # noqa: PLC0415 - `serve` extra
    from vlm.data.sequential import iterate_samples  # noqa: PLC0415 - torch costs seconds

    for folder in shards:
        for sample in iterate_samples(folder):
            yield Pair(
                id=sample.key, image=sample.image, text=sample.text, metadata=sample.metadata
            )
