"""`vlm data write`: pairs of any kind to shards."""

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from vlm.cli.progress import counted, terminated_as_interrupted
from vlm.cli.train import RESUME_ME
from vlm.errors import DataError
from vlm.files import is_url

if TYPE_CHECKING:
    from vlm.data.sources.protocol import SampleSource
    from vlm.data.write_parallel import WriteProgress

__all__ = ["write"]

_LINE_EVERY_SECONDS: Final = 5.0


def write(
    source: Annotated[
        str,
        typer.Argument(
            help="Images, indexed shards or their URL, or a .csv .tsv .jsonl .parquet table."
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="{folder}",
            help="Where the shards go; empty, or left by an interrupted call.",
        ),
    ],
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    prefix: Annotated[str, typer.Option(help="What shard names start with.")] = "shard",
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: all cores.", min=1)
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Shrink larger images to this side in pixels.", min=1)
    ] = None,
    resize_mode: Annotated[
        Literal["shorter", "longer"], typer.Option(help="The side that --size means.")
    ] = "shorter",
    image_format: Annotated[
        Literal["webp", "jpeg", "png", "keep"],
        typer.Option("--format", help="Images that fit already are stored untouched."),
    ] = "keep",
    quality: Annotated[int, typer.Option(help="Of JPEG and WebP.", min=1, max=100)] = 90,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="List bad samples in skipped.jsonl and go on.")
    ] = False,
    image_column: Annotated[str | None, typer.Option(help="Of a table.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Of a table.")] = None,
) -> None:
    """Turn pairs into webdataset shards with a manifest; interrupted, the same call goes on."""
    from vlm.data.location import local_folder  # noqa: PLC0415 - numpy
    from vlm.data.write_parallel import (  # noqa: PLC0415 - webdataset imports torch
        SKIPPED_NAME,
        WriteOptions,
        write_dataset,
    )
    from vlm.preprocess import reencode_image  # noqa: PLC0415 - torch

    what = "shards are written to a folder; name one, and upload what is in it then"
    folder = local_folder(target, what=what)
    image: dict[str, Any] = {}
    if size is not None or image_format != "keep":
        image = {
            "size": size,
            "resize_mode": resize_mode,
            "image_format": image_format,
            "quality": quality,
        }
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        with terminated_as_interrupted(), _Display(console) as display:
            result = write_dataset(
                partial(_open_source, source, image_column, caption_column),
                folder,
                options=WriteOptions(
                    prefix=prefix,
                    samples_per_shard=samples_per_shard,
                    skip_bad=skip_bad,
                    image=image,
                ),
                encode=partial(reencode_image, **image) if image else None,
                workers=workers or os.cpu_count() or 1,
                progress=display.written,
                indexing=display.indexed,
            )
    except KeyboardInterrupt:
        console.print(f"stopped; {folder} holds whole shards, the same command goes on from them")
        raise typer.Exit(RESUME_ME) from None
    shards = counted(result.num_shards, "shard")
    console.print(f"{counted(result.num_samples, 'pair')} in {shards}: {folder}")
    if result.num_skipped:
        console.print(f"{result.num_skipped} bad samples left out: {folder / SKIPPED_NAME}")


def _open_source(
    location: str, image_column: str | None, caption_column: str | None, scratch: Path
) -> "SampleSource":
    from vlm.data.manifest import holds_shards  # noqa: PLC0415 - with it
    from vlm.data.sources.folder import open_folder  # noqa: PLC0415 - numpy
    from vlm.data.sources.shards import ShardsSource  # noqa: PLC0415 - with it
    from vlm.data.sources.table import TABLE_SUFFIXES, open_table  # noqa: PLC0415 - pyarrow

    if is_url(location):
        return ShardsSource(location)
    path = Path(location)
    if path.is_dir():
        return ShardsSource(path) if holds_shards(path) else open_folder(path)
    if path.suffix in TABLE_SUFFIXES:
        return open_table(
            path, scratch=scratch, image_column=image_column, caption_column=caption_column
        )
    message = f"{path}: expected a folder or a table ({' '.join(TABLE_SUFFIXES)})"
    raise DataError(message)


class _Display:
    """A live line in a terminal; elsewhere a line now and then, and for the last shard."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = self._said = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} shards  {task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("writing", total=None, visible=False, figures="")

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def written(self, now: "WriteProgress") -> None:
        if now.rows == 0:
            self._start = time.monotonic()
            if 0 < now.shards < now.total_shards:
                self._console.print(f"{now.shards} of {now.total_shards} shards are there already")
            return
        rate = now.rows / max(time.monotonic() - self._start, 1e-9)
        minutes, seconds = divmod(round(now.remaining_rows / rate), 60)
        figures = f"{rate:.0f} samples/s  ETA {minutes}:{seconds:02d}"
        self._show("writing", now.shards, now.total_shards, figures)

    def indexed(self, done: int, total: int) -> None:
        self._show("indexing", done, total, "")

    def _show(self, verb: str, done: int, total: int, figures: str) -> None:
        self._progress.update(
            self._task, description=verb, completed=done, total=total, visible=True, figures=figures
        )
        now = time.monotonic()
        due = done == total or now - self._said >= _LINE_EVERY_SECONDS
        if due and not self._console.is_terminal:
            self._said = now
            self._console.print(f"{verb} shard {done}/{total}  {figures}".rstrip())
