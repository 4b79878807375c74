"""`vlm index move`: from one store into another."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlm.cli.index import Report, existing_collection, opened_catalog, store_errors
from vlm.errors import DataError

if TYPE_CHECKING:
    from serving.stores import Store

__all__ = ["move_collection"]

Place = Annotated[
    Path, typer.Option(help="Folder of a default collection, or a server's YAML with its store.")
]
_DEFAULT = Path("runs/demo/index")
_PAGE = 1000


@store_errors()
def move_collection(
    to: Annotated[
        Path, typer.Option(help="The same, for where it shall be: a folder, or a server's YAML.")
    ],
    index: Place = _DEFAULT,
    collection: Annotated[str, typer.Option(help="A collection or alias.")] = "default",
    name: Annotated[
        str | None, typer.Option(help="What it is called there; default: the same.")
    ] = None,
    replace: Annotated[
        bool, typer.Option(help="Remove what is there and not in the collection.")
    ] = False,
) -> None:
    """Copy a collection into another store as it is, and compare count and checksum of both.

    Interrupted and run again, it goes on. What is copied from stays; measure and serve the copy,
    then remove it.
    """
    from serving.services.migration import move, verify  # noqa: PLC0415 - `serve` extra

    console = Console(soft_wrap=True)
    origin, destination = opened_catalog(index), opened_catalog(to)
    source = existing_collection(origin, collection)
    known = origin.find(collection)
    called = name or collection
    place = destination.describe(called)
    if known is not None and origin.describe(known.name) == place:
        message = f"{place} is where it is already; choose another place or --name"
        raise DataError(message)
    target = destination.open(called, fingerprint=source.fingerprint, dim=source.dim)
    if not replace:
        _check_only_copies(source, target, place)
    done = move(source, target, progress=Report(console, source.count()))
    try:
        items, checksum = verify(source, target)
    except ValueError as error:
        raise DataError(str(error)) from error
    console.print(
        f"{done.written} items written, {done.kept} were there already, {done.removed} removed: "
        f"{place} has the same {items} items, sha256 {checksum[:16]}",
        highlight=False,
    )


def _check_only_copies(source: "Store", target: "Store", place: str) -> None:
    """A move makes both the same: what is only in the target would be gone."""
    after = ""
    while page := target.scan(_PAGE, after=after):
        ids = [item.id for item in page]
        strange = sorted(set(ids) - source.existing(ids))
        if strange:
            message = (
                f"{place}: has items that are not in the collection, {strange[0]!r} for one; "
                f"choose another --name, or let them be removed with --replace"
            )
            raise DataError(message)
        after = ids[-1]
