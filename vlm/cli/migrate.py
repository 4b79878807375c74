"""`vlm index migrate`: give a collection another model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlm.cli.index import (
    Bundle,
    ExactBelow,
    Index,
    Report,
    Target,
    existing_collection,
    opened_catalog,
    pairs_of,
    store_errors,
    tune,
)
from vlm.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from serving.stores import Catalog, Item, Store
    from vlm.inference import Encoder

__all__ = ["migrate"]

_THUMBNAIL_SIDE = 128


@store_errors()
def migrate(
    to: Annotated[str, typer.Argument(help="Name of the new collection.")],
    shards: Annotated[
        list[Path] | None, typer.Argument(help="Datasets with the original pictures.")
    ] = None,
    bundle: Bundle = Path("runs/demo/bundle"),
    index: Index = None,
    collection: Annotated[
        str, typer.Option(help="The collection or alias whose items get new vectors.")
    ] = "default",
    thumbnails: Annotated[
        bool, typer.Option(help="Embed the stored small pictures where there is no original.")
    ] = False,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Most items a second; default: all it can.")
    ] = None,
    target: Target = 0.95,
    exact_below: ExactBelow = 20_000,
) -> None:
    """Embed a collection again with another model, and let its name stand for the new one.

    Searches and writes go on meanwhile; interrupted and run again, it goes on. The old collection
    stays as it is.
    """
    from serving.services.indexing import embed_again, index_pairs  # noqa: PLC0415 - `serve` extra
    from serving.services.migration import move  # noqa: PLC0415 - with it
    from vlm.inference import Encoder  # noqa: PLC0415 - torch costs seconds

    console = Console(soft_wrap=True)
    encoder = Encoder.load(bundle)
    catalog = opened_catalog(index or bundle.parent / "index")
    source = _source(catalog, collection, to)
    store = catalog.open(to, fingerprint=encoder.fingerprint, dim=encoder.dim)
    report = Report(console, source.count())
    if shards:
        pairs = (pair for pair in pairs_of(shards) if source.existing([pair.id]))
        index_pairs(encoder, store, pairs, progress=report)

    def embed(items: "list[Item]") -> "list[np.ndarray]":
        _check_pictures(encoder, items, thumbnails)
        return embed_again(encoder, items)

    def switch() -> None:
        tune(console, encoder, store, catalog, to, target, exact_below)
        catalog.point(collection, to)

    done = move(source, store, embed=embed, switch=switch, progress=report, items_per_second=rate)
    console.print(
        f"{done.written} items written, {done.kept} kept, {done.removed} removed: {collection!r} "
        f"now stands for {to!r} of model {encoder.fingerprint[:12]}",
        highlight=False,
    )


def _source(catalog: "Catalog", collection: str, to: str) -> "Store":
    name = catalog.aliases().get(collection, collection)
    if to in (name, collection, "default") or "/" in to or to.startswith("."):
        message = f"{to!r} cannot be the new collection's name; choose another than {name!r}"
        raise DataError(message)
    return existing_collection(catalog, collection)


def _check_pictures(encoder: "Encoder", items: "list[Item]", thumbnails: bool) -> None:
    """Small pictures stand for the originals only where nothing is lost, or it is allowed."""
    pictures = [item for item in items if item.modality == "image"]
    if pictures and not thumbnails and encoder.info.image.size > _THUMBNAIL_SIDE:
        message = (
            f"{pictures[0].id} and perhaps more are in none of the datasets given, and the model "
            f"takes {encoder.info.image.size} pixels where {_THUMBNAIL_SIDE} are stored; name "
            f"their datasets, or allow --thumbnails"
        )
        raise DataError(message)
