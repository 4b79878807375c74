"""`vlm index snapshot`, `snapshots` and `restore`: states of a collection under names."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlm.cli.index import collection_folder, collections_folder
from vlm.errors import DataError

if TYPE_CHECKING:
    from serving.stores import EmbeddedStore

__all__ = ["restore", "snapshot", "snapshots"]

Name = Annotated[str, typer.Argument(help="Of the snapshot.")]
Index = Annotated[Path, typer.Option(help="Folder of the default collection.")]
Collection = Annotated[str, typer.Option(help="A collection or alias.")]
_DEFAULT = Path("runs/demo/index")


def snapshot(
    name: Name,
    index: Index = _DEFAULT,
    collection: Collection = "default",
    drop: Annotated[bool, typer.Option(help="Let the snapshot go instead.")] = False,
) -> None:
    """Keep the state of now under a name; what was under it before is let go."""
    store = existing_collection(index, collection)
    if drop:
        _known(store, name)
        store.drop_snapshot(name)
    else:
        store.snapshot(name)
    _say(f"{'dropped' if drop else 'kept'} {name!r}; there are: {_names(store)}")


def snapshots(index: Index = _DEFAULT, collection: Collection = "default") -> None:
    """List the states that are kept."""
    _say(_names(existing_collection(index, collection)))


def restore(name: Name, index: Index = _DEFAULT, collection: Collection = "default") -> None:
    """Make a kept state the state of now; a running server answers from it at once."""
    store = existing_collection(index, collection)
    _known(store, name)
    store.restore(name)
    _say(f"restored {name!r}: {store.count()} items")


def existing_collection(root: Path, name: str) -> "EmbeddedStore":
    """The collection of a name or alias, whichever model's it is; DataError if there is none."""
    from serving.errors import ServingError  # noqa: PLC0415 - `serve` extra
    from serving.services.aliases import read_aliases  # noqa: PLC0415 - with it
    from serving.stores import EmbeddedStore, read_collection_info  # noqa: PLC0415 - with it

    folder = collection_folder(root, read_aliases(collections_folder(root)).get(name, name))
    info = read_collection_info(folder)
    if info is None:
        message = f"{folder}: no collection there; fill one with vlm index SHARDS"
        raise DataError(message)
    try:
        return EmbeddedStore(folder, fingerprint=info.fingerprint, dim=info.dim)
    except ServingError as error:
        raise DataError(str(error)) from error


def _known(store: "EmbeddedStore", name: str) -> None:
    if name not in store.snapshots():
        message = f"no snapshot {name!r}; there are: {_names(store)}"
        raise DataError(message)


def _names(store: "EmbeddedStore") -> str:
    return ", ".join(store.snapshots()) or "none"


def _say(text: str) -> None:
    Console(soft_wrap=True).print(text, highlight=False, markup=False)
