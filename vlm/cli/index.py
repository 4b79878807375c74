"""`vlm index`: make datasets searchable."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from typer.core import TyperGroup

from vlm.errors import DataError

if TYPE_CHECKING:
    from serving.services.indexing import Pair
    from serving.stores import Catalog, Item, Store
    from vlm.inference import Encoder

__all__ = ["app", "existing_collection", "index", "opened_catalog", "store_errors"]

Shards = Annotated[
    list[Path], typer.Argument(help="Dataset folders, or what `vlm embed` wrote of them.")
]
Bundle = Annotated[Path, typer.Option(help="The model.")]
Index = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the default collection, or a server's YAML, whose store is meant; "
        "default: beside the bundle."
    ),
]
_SHOWN: Final = 5
Target = Annotated[float, typer.Option(min=0, max=1, help="Recall@10 that an index must reach.")]
ExactBelow = Annotated[int, typer.Option(min=1, help="Of fewer items every one is compared.")]


class _FillsByDefault(TyperGroup):
    """`vlm index SHARDS` is `vlm index add SHARDS`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # typer's own copy of click
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["add", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_FillsByDefault,
    no_args_is_help=True,
    help="Make datasets searchable: vlm index SHARDS, and more.",
)


@contextmanager
def store_errors() -> Iterator[None]:
    """What a store refuses is told without a traceback."""
    from serving.errors import ServingError  # noqa: PLC0415 - `serve` extra

    try:
        yield
    except ServingError as error:
        raise DataError(str(error)) from error


@app.command("add")
@store_errors()
def index(
    shards: Shards,
    bundle: Bundle = Path("runs/demo/bundle"),
    index: Index = None,
    collection: Annotated[
        str | None, typer.Option(help="A further collection, beside the default one.")
    ] = None,
    target: Target = 0.95,
    exact_below: ExactBelow = 20_000,
) -> None:
    """Embed the images of datasets and make them searchable; run again, it goes on."""
    from serving.services.indexing import index_items, index_pairs  # noqa: PLC0415 - `serve` extra
    from vlm.inference import Encoder  # noqa: PLC0415 - torch costs seconds
    from vlm.inference.embeddings import holds_embeddings  # noqa: PLC0415 - with it

    console = Console(soft_wrap=True)
    embedded = [folder for folder in shards if holds_embeddings(folder)]
    raw = [folder for folder in shards if folder not in embedded]
    total = sum(_count(folder) for folder in shards)
    encoder = Encoder.load(bundle)
    catalog = opened_catalog(index or bundle.parent / "index")
    name = "default" if collection is None else collection
    store = catalog.open(name, fingerprint=encoder.fingerprint, dim=encoder.dim)
    report = Report(console, total)
    items = _items(embedded, encoder.fingerprint)
    stored, skipped = index_items(store, items, progress=report)
    broken: list[str] = []
    more, known = index_pairs(
        encoder,
        store,
        pairs_of(raw),
        progress=lambda s, k: report(stored + s, skipped + k),
        broken=broken.append,
    )
    stored, skipped = stored + more, skipped + known - len(broken)
    console.print(
        f"{stored} images indexed, {skipped} were there already: {catalog.describe(name)}",
        highlight=False,
    )
    if broken:
        shown = "".join(f"\n  {line}" for line in broken[:_SHOWN])
        more_text = f"\n  and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        console.print(
            f"{len(broken)} were left out, whose images cannot be read:{shown}{more_text}",
            highlight=False,
            markup=False,
        )
    tune(console, encoder, store, catalog, name, target, exact_below)


def opened_catalog(place: Path) -> "Catalog":
    """The collections of a folder or of a server's YAML."""
    from serving.services.catalogs import catalog_at  # noqa: PLC0415 - `serve` extra

    return catalog_at(place)


def existing_collection(catalog: "Catalog", asked: str) -> "Store":
    """The collection of a name or alias, whichever model's it is; DataError if there is none."""
    known = catalog.find(asked)
    if known is None:
        message = f"{catalog.describe(asked)}: no collection there; fill one with vlm index SHARDS"
        raise DataError(message)
    return catalog.open(known.name, fingerprint=known.info.fingerprint, dim=known.info.dim)


def tune(
    console: Console,
    encoder: "Encoder",
    store: "Store",
    catalog: "Catalog",
    name: str,
    target: float,
    exact_below: int,
) -> None:
    """Index and measure a collection that has outgrown exact search, and tell what was found."""
    from serving.services.indexing import tune_collection  # noqa: PLC0415 - `serve` extra

    if store.count() >= exact_below:
        console.print("looking after the index and measuring its recall", highlight=False)
    found = tune_collection(encoder, store, catalog, name, target=target, exact_below=exact_below)
    if found is None:
        return
    shares = ", ".join(f"{kind} {share:.3f}" for kind, share in found.chosen.recall.items())
    effort = found.chosen.effort
    how = "exact search" if effort is None else f"{effort.probes} probes, refine {effort.refine}"
    console.print(
        f"recall@10 against exact search: {shares} with {how}, "
        f"{found.chosen.milliseconds:.1f} ms a search",
        highlight=False,
    )


class Report:
    """Prints how far an import is, every two seconds and at the end."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._start = self._last = time.monotonic()

    def __call__(self, stored: int, skipped: int) -> None:
        done, now = stored + skipped, time.monotonic()
        if now - self._last < 2 and done < self._total:
            return
        self._last = now
        rate = done / max(now - self._start, 1e-9)
        self._console.print(
            f"{done}/{self._total} items, {rate:.0f} a second, "
            f"ETA {max(0, self._total - done) / rate:.0f} s",
            highlight=False,
        )


def pairs_of(shards: list[Path]) -> "Iterator[Pair]":
    """The samples of dataset folders."""
    from serving.services.indexing import Pair  # noqa: PLC0415 - `serve` extra
    from vlm.data.sequential import iterate_samples  # noqa: PLC0415 - torch costs seconds

    for folder in shards:
        for sample in iterate_samples(folder):
            yield Pair(
                id=sample.key, image=sample.image, text=sample.text, metadata=sample.metadata
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
