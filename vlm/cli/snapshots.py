"""`vlm index snapshot`, `snapshots` and `restore`: states of a collection under names."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlm.cli.index import existing_collection, opened_catalog, store_errors
from vlm.errors import DataError

if TYPE_CHECKING:
    from serving.stores import EmbeddedStore

__all__ = ["restore", "snapshot", "snapshots"]

Name = Annotated[str, typer.Argument(help="Of the snapshot.")]
Index = Annotated[Path, typer.Option(help="Folder of the default collection.")]
Collection = Annotated[str, typer.Option(help="A collection or alias.")]
_DEFAULT = Path("runs/demo/index")


@store_errors()
def snapshot(
    name: Name,
    index: Index = _DEFAULT,
    collection: Collection = "default",
    drop: Annotated[bool, typer.Option(help="Let the snapshot go instead.")] = False,
) -> None:
    """Keep the state of now under a name; what was under it before is let go."""
    store = _kept(index, collection)
    if drop:
        _known(store, name)
        store.drop_snapshot(name)
    else:
        store.snapshot(name)
    _say(f"{'dropped' if drop else 'kept'} {name!r}; there are: {_names(store)}")


@store_errors()
def snapshots(index: Index = _DEFAULT, collection: Collection = "default") -> None:
    """List the states that are kept."""
    _say(_names(_kept(index, collection)))


@store_errors()
def restore(name: Name, index: Index = _DEFAULT, collection: Collection = "default") -> None:
    """Make a kept state the state of now; a running server answers from it at once."""
    store = _kept(index, collection)
    _known(store, name)
    store.restore(name)
    _say(f"restored {name!r}: {store.count()} items")


def _kept(index: Path, collection: str) -> "EmbeddedStore":
    from serving.stores import EmbeddedStore  # noqa: PLC0415 - `serve` extra

    store = existing_collection(opened_catalog(index), collection)
    if not isinstance(store, EmbeddedStore):
        message = (
            f"{collection!r}: only the embedded store keeps snapshots; a cluster has backups of "
            f"its own, or move the collection into a folder with vlm index move"
        )
        raise DataError(message)
    return store


def _known(store: "EmbeddedStore", name: str) -> None:
    if name not in store.snapshots():
        message = f"no snapshot {name!r}; there are: {_names(store)}"
        raise DataError(message)


def _names(store: "EmbeddedStore") -> str:
    return ", ".join(store.snapshots()) or "none"


def _say(text: str) -> None:
    Console(soft_wrap=True).print(text, highlight=False, markup=False)
