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
    from serving.stores import Item

__all__ = ["index"]


def index(
    shards: Annotated[
        list[Path], typer.Argument(help="Dataset folders, or what `vlm embed` wrote of them.")
    ],
    bundle: Annotated[Path, typer.Option(help="The model.")] = Path("runs/demo/bundle"),
    index: Annotated[
        Path | None, typer.Option(help="Folder of the collection; default: beside the bundle.")
    ] = None,
) -> None:
    """Embed the images of datasets and make them searchable; run again, it goes on."""
    from serving.errors import FingerprintError  # noqa: PLC0415 - `serve` extra
    from serving.services.indexing import index_items, index_pairs  # noqa: PLC0415 - `serve` extra
    from serving.stores import EmbeddedStore  # noqa: PLC0415 - `serve` extra
    from vlm.inference import Encoder  # noqa: PLC0415 - torch costs seconds
    from vlm.inference.embeddings import holds_embeddings  # noqa: PLC0415 - with it

    console = Console(soft_wrap=True)
    embedded = [folder for folder in shards if holds_embeddings(folder)]
    raw = [folder for folder in shards if folder not in embedded]
    total = sum(_count(folder) for folder in shards)
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

    items = _items(embedded, encoder.fingerprint)
    stored, skipped = index_items(store, items, progress=report)
    more, known = index_pairs(
        encoder, store, _pairs(raw), progress=lambda s, k: report(stored + s, skipped + k)
    )
    stored, skipped = stored + more, skipped + known
    console.print(
        f"{stored} images indexed, {skipped} were there already: {folder}", highlight=False
    )


def _count(folder: Path) -> int:
    from vlm.data.manifest import open_manifest  # noqa: PLC0415 - numpy
    from vlm.inference.embeddings import (  # noqa: PLC0415 - torch costs seconds
        holds_embeddings,
        read_embeddings_info,
    )

    if holds_embeddings(folder):
        return read_embeddings_info(folder).num_rows
    return open_manifest(folder).num_samples


def _items(folders: list[Path], fingerprint: str) -> "Iterator[Item]":
    from serving.stores import Item  # noqa: PLC0415 - `serve` extra
    from vlm.inference.embeddings import iterate_embeddings  # noqa: PLC0415 - torch costs seconds

    for folder in folders:
        for rows in iterate_embeddings(folder, fingerprint=fingerprint, chunk=1024):
            for row in zip(rows.ids, rows.vectors, rows.texts, rows.metadata, strict=True):
                item_id, vector, text, metadata = row
                yield Item(id=item_id, vector=vector, text=text, metadata=metadata)


def _pairs(shards: list[Path]) -> "Iterator[Pair]":
    from serving.services.indexing import Pair  # noqa: PLC0415 - `serve` extra
    from vlm.data.sequential import iterate_samples  # noqa: PLC0415 - torch costs seconds

    for folder in shards:
        for sample in iterate_samples(folder):
            yield Pair(
                id=sample.key, image=sample.image, text=sample.text, metadata=sample.metadata
            )
