"""`vlm data …`: fetch, write, index, show and check datasets."""

import os
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm.cli.data_filter import filter_dataset
from vlm.cli.data_stats import describe_dataset
from vlm.cli.data_write import write
from vlm.cli.progress import StageProgress
from vlm.errors import DataError

__all__ = ["app"]

_SHOWN_DAMAGES = 20

app = typer.Typer(help="Fetch, write, index, show and check datasets of webdataset shards.")
fetch_app = typer.Typer(help="Build a known dataset from public packages.")
app.add_typer(fetch_app, name="fetch")
app.command()(write)
app.command("filter")(filter_dataset)
app.command("stats")(describe_dataset)


@fetch_app.command()
def emoji(
    folder: Annotated[Path, typer.Option(help="Where the dataset goes.")] = Path("data/emoji"),
    style: Annotated[
        list[str] | None, typer.Option(help="A drawing style; repeat it. Default: all but 3D.")
    ] = None,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.", min=16)] = 128,
    workers: Annotated[
        int | None, typer.Option(help="Rasterising processes; default: all cores.", min=1)
    ] = None,
) -> None:
    """Emoji drawings in several styles with names and tags; about 9,000 real pairs."""
    from vlm.data.sources.emoji_fetch import DEFAULT_STYLES, fetch_emoji  # noqa: PLC0415 - slow

    console = Console(soft_wrap=True)
    start = time.monotonic()
    counts = fetch_emoji(
        folder,
        styles=style or DEFAULT_STYLES,
        size=size,
        workers=workers or os.cpu_count() or 1,
        say=lambda line: console.print(line, highlight=False),
    )
    for split, count in sorted(counts.items()):
        console.print(f"  {split}: {count} pairs", highlight=False)
    console.print(f"{folder}/shards in {time.monotonic() - start:.0f} s", highlight=False)


@app.command()
def index(folder: Annotated[Path, typer.Argument(help="A folder of .tar shards.")]) -> None:
    """Scan shards made by anybody, and write their manifest and index."""
    from vlm.data.manifest import build_manifest  # noqa: PLC0415 - numpy

    console = Console(soft_wrap=True)
    manifest = build_manifest(folder, progress=partial(StageProgress(console), "shard"))
    console.print(f"{manifest.num_samples} samples indexed: {folder}", highlight=False)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="An indexed folder of shards.")],
    limit: Annotated[int, typer.Option(help="Samples to print.", min=0)] = 5,
) -> None:
    """Counts of a dataset, and its first samples."""
    from vlm.data.manifest import open_manifest  # noqa: PLC0415 - numpy
    from vlm.data.reader import Reader  # noqa: PLC0415 - with it

    manifest = open_manifest(folder)
    console = Console(soft_wrap=True)
    size = sum(shard.num_bytes for shard in manifest.shards)
    console.print(
        f"{folder}: {manifest.num_samples} samples, {len(manifest.shards)} shards, "
        f"{size / 1e6:.1f} MB, fingerprint {manifest.fingerprint[:12]}",
        highlight=False,
    )
    with Reader(manifest) as reader:
        for row in range(min(limit, manifest.num_samples)):
            sample = reader.read(row)
            console.print(
                f"  {sample.key}: {sample.text!r}, {len(sample.image)} bytes of image, "
                f"{', '.join(sample.metadata) or 'no metadata'}",
                highlight=False,
                markup=False,
            )


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A folder of .tar shards.")],
    repair: Annotated[bool, typer.Option("--repair", help="Rewrite damaged shards.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: all cores.", min=1)
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Larger images are damage; default: 50 million.", min=1)
    ] = None,
) -> None:
    """Read and decode every sample, and say what is damaged; with --repair keep what is good."""
    from vlm.data.check import DAMAGED_FOLDER, check_shards  # noqa: PLC0415 - numpy
    from vlm.data.manifest import build_manifest  # noqa: PLC0415 - with it
    from vlm.preprocess import DEFAULT_MAX_PIXELS, decode_image  # noqa: PLC0415 - torch

    console = Console(soft_wrap=True, highlight=False, markup=False)
    reports = check_shards(
        folder,
        decode=partial(decode_image, max_pixels=max_pixels or DEFAULT_MAX_PIXELS),
        repair=repair,
        workers=workers or os.cpu_count() or 1,
        progress=partial(StageProgress(console), "shard"),
    )
    damages = [damage for report in reports for damage in report.damages]
    for damage in damages[:_SHOWN_DAMAGES]:
        sample = "" if damage.key is None else f"sample {damage.key!r} "
        console.print(f"  {damage.shard}: {sample}at byte {damage.offset}: {damage.reason}")
    if len(damages) > _SHOWN_DAMAGES:
        console.print(f"  and {len(damages) - _SHOWN_DAMAGES} more")
    good = sum(report.num_good for report in reports)
    console.print(f"{good} good samples in {len(reports)} shards, {len(damages)} damages")
    if damages and not repair:
        message = f"{folder}: damaged; `vlm data check {folder} --repair` keeps the good samples"
        raise DataError(message)
    if damages:
        manifest = build_manifest(folder)
        mended = sum(report.mended for report in reports)
        aside = f"; {mended} damaged shards are kept in {folder / DAMAGED_FOLDER}" if mended else ""
        console.print(f"{manifest.num_samples} samples indexed{aside}")
