"""`vlm embed`: a dataset into files, or a few images and texts."""

from pathlib import Path
from typing import Annotated

import typer

from vlm.cli.asking import Bundle, Key, KeyFile, Server, client_of
from vlm.cli.embed_dataset import embed_dataset
from vlm.cli.embed_items import embed_items
from vlm.errors import ConfigError
from vlm.files import is_url

__all__ = ["embed"]


def embed(
    inputs: Annotated[
        list[str] | None, typer.Argument(help="One dataset, a folder or a URL; or image files.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    bundle: Bundle = Path("runs/demo/bundle"),
    out: Annotated[
        Path | None,
        typer.Option(help="Of a dataset: folder of Parquet files. Else: .npy, or JSON lines."),
    ] = None,
    pods: Annotated[
        int | None,
        typer.Option(min=1, help="In an Indexed Job: its completions. Under torchrun: leave out."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one forward pass.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="That read and decode ahead.")] = 4,
    max_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Part of a shard that may fail to decode.")
    ] = 0.01,
    cache: Annotated[Path | None, typer.Option(help="Where bytes of a URL are kept.")] = None,
    server: Server = None,
    key_file: KeyFile = None,
    key: Key = None,
) -> None:
    """Embed a dataset into Parquet files, one a shard; or image files and texts, as rows.

    A dataset's work is shared by processes and goes on when it is started again: each rank of
    torchrun, or each pod of an Indexed Job, takes its range of shards; SIGTERM exits with 75.
    """
    named, texts = inputs or [], text or []
    if not named and not texts:
        message = "nothing to embed: name a dataset or image files, or --text 'a red apple'"
        raise ConfigError(message)
    datasets = [name for name in named if is_url(name) or Path(name).is_dir()]
    if not datasets:
        client = None if server is None else client_of(server, key, key_file)
        embed_items([Path(name) for name in named], texts, out, bundle=bundle, client=client)
        return
    if len(named) > 1 or texts or server is not None or out is None:
        message = (
            f"{datasets[0]}: a dataset; it is embedded alone, in this process, into a folder: "
            f"vlm embed {datasets[0]} --out FOLDER"
        )
        raise ConfigError(message)
    embed_dataset(
        datasets[0],
        bundle,
        out,
        pods=pods,
        dtype=dtype,
        batch_size=batch_size,
        threads=threads,
        max_bad=max_bad,
        cache=cache,
    )
