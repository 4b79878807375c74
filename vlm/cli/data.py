"""`vlm data …`: fetch, write, index, show and check datasets."""

import json
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlm.cli.data_filter import filter_dataset
from vlm.cli.data_stats import describe_dataset
from vlm.cli.data_write import write
from vlm.cli.progress import StageProgress, counted, terminated_as_interrupted
from vlm.errors import DataError
from vlm.files import is_url, write_text_whole

if TYPE_CHECKING:
    from vlm.data.check import Damage

__all__ = ["app"]

_SHOWN_DAMAGES = 20
_SECONDS_BETWEEN_LINES = 2.0

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
def index(location: Annotated[str, typer.Argument(help="A folder of .tar shards.")]) -> None:
    """Scan shards made by anybody, and write their manifest and index."""
    from vlm.data.location import local_folder  # noqa: PLC0415 - numpy
    from vlm.data.manifest import build_manifest  # noqa: PLC0415 - with it

    what = "shards are indexed where they are local; upload manifest and tables beside them then"
    folder = local_folder(location, what=what)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    progress = StageProgress(console, every_seconds=_SECONDS_BETWEEN_LINES)
    with terminated_as_interrupted():
        manifest = build_manifest(folder, progress=partial(progress, "shard"))
    console.print(f"{counted(manifest.num_samples, 'sample')} indexed: {folder}")


@app.command()
def show(
    location: Annotated[str, typer.Argument(help="An indexed folder of shards, or its URL.")],
    limit: Annotated[int, typer.Option(help="Samples to print.", min=0)] = 5,
) -> None:
    """Counts of a dataset, and its first samples."""
    from vlm.data.location import open_location  # noqa: PLC0415 - numpy
    from vlm.data.reader import Reader  # noqa: PLC0415 - with it
    from vlm.data.remote import RemoteConfig  # noqa: PLC0415 - with it

    manifest, shards = open_location(location, RemoteConfig())
    console = Console(soft_wrap=True, highlight=False, markup=False)
    size = sum(shard.num_bytes for shard in manifest.shards)
    console.print(
        f"{location}: {counted(manifest.num_samples, 'sample')}, "
        f"{counted(len(manifest.shards), 'shard')}, {size / 1e6:.1f} MB, "
        f"fingerprint {manifest.fingerprint[:12]}"
    )
    with Reader(manifest, shards=shards) as reader:
        for row in range(min(limit, manifest.num_samples)):
            sample = reader.read(row)
            console.print(
                f"  {sample.key}: {sample.text!r}, {len(sample.image)} bytes of image, "
                f"{', '.join(sample.metadata) or 'no metadata'}"
            )


@app.command()
def check(
    location: Annotated[
        str, typer.Argument(help="A folder of .tar shards, or the URL of an indexed one.")
    ],
    repair: Annotated[bool, typer.Option("--repair", help="Rewrite damaged shards.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="A file for all damages, a JSON object a line.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: all cores.", min=1)
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Larger images are damage; default: 50 million.", min=1)
    ] = None,
) -> None:
    """Read and decode every sample, and say what is damaged; with --repair keep what is good."""
    from vlm.data.check import check_remote_shards, check_shards  # noqa: PLC0415 - numpy
    from vlm.data.location import local_folder  # noqa: PLC0415 - with it
    from vlm.preprocess import DEFAULT_MAX_PIXELS, decode_image  # noqa: PLC0415 - torch

    what = "shards are repaired where they are local; repair that folder and upload it again"
    if repair:
        local_folder(location, what=what)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    progress = StageProgress(console, every_seconds=_SECONDS_BETWEEN_LINES)
    checking = (
        partial(check_remote_shards, location)
        if is_url(location)
        else partial(check_shards, Path(location), repair=repair)
    )
    with terminated_as_interrupted():
        reports = checking(
            decode=partial(decode_image, max_pixels=max_pixels or DEFAULT_MAX_PIXELS),
            workers=workers or os.cpu_count() or 1,
            progress=partial(progress, "shard"),
        )
    damages = [damage for found in reports for damage in found.damages]
    if report is not None:
        lines = (json.dumps(asdict(damage), ensure_ascii=False) for damage in damages)
        write_text_whole(report, "".join(f"{line}\n" for line in lines))
    _say_damages(console, damages)
    good = counted(sum(found.num_good for found in reports), "good sample")
    shards = counted(len(reports), "shard")
    console.print(f"{good} in {shards}, {counted(len(damages), 'damage')}")
    if not damages:
        return
    if repair:
        _say_repaired(console, Path(location), sum(found.mended for found in reports))
        return
    repairing = f"`vlm data check {location} --repair` keeps the good samples"
    advice = what if is_url(location) else repairing
    message = f"{location}: damaged; {advice}"
    raise DataError(message)


def _say_damages(console: Console, damages: "list[Damage]") -> None:
    for damage in damages[:_SHOWN_DAMAGES]:
        sample = "" if damage.key is None else f"sample {damage.key!r} "
        console.print(f"  {damage.shard}: {sample}at byte {damage.offset}: {damage.reason}")
    if len(damages) > _SHOWN_DAMAGES:
        console.print(f"  and {len(damages) - _SHOWN_DAMAGES} more; --report FILE lists all")


def _say_repaired(console: Console, folder: Path, mended: int) -> None:
    from vlm.data.manifest import build_manifest  # noqa: PLC0415 - numpy
    from vlm.data.scan import DAMAGED_FOLDER  # noqa: PLC0415 - with it

    manifest = build_manifest(folder)
    aside = f"; of {counted(mended, 'shard')} the damaged one is in {folder / DAMAGED_FOLDER}"
    indexed = counted(manifest.num_samples, "sample")
    console.print(f"{indexed} indexed{aside if mended else ''}")
