"""`vlm data stats`."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vlm.cli.progress import StageProgress, terminated_as_interrupted

__all__ = ["describe_dataset"]


def describe_dataset(
    location: Annotated[str, typer.Argument(help="An indexed folder of shards, or its URL.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the page goes; default: FOLDER/stats.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Read this many samples, drawn at random.", min=1)
    ] = None,
    pictures: Annotated[int, typer.Option(help="Samples to show.", min=0)] = 24,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.", min=0)] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: all cores.", min=1)
    ] = None,
) -> None:
    """Counts, sizes, captions, duplicates and languages: a table, stats.json and stats.html."""
    import numpy as np  # noqa: PLC0415 - slow

    from vlm.data.location import local_folder  # noqa: PLC0415 - numpy
    from vlm.data.stats import measure_stats  # noqa: PLC0415 - numpy
    from vlm.data.stats_page import stats_page, stats_rows  # noqa: PLC0415 - with it
    from vlm.files import write_text_whole  # noqa: PLC0415 - with it
    from vlm.preprocess import DEFAULT_MAX_PIXELS, decode_picture  # noqa: PLC0415 - torch

    what = "the page is written to a folder; name one with --out"
    target = out or local_folder(location, what=what) / "stats"
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with terminated_as_interrupted():
        stats = measure_stats(
            location,
            decode=partial(decode_picture, max_pixels=DEFAULT_MAX_PIXELS),
            generator=np.random.default_rng(seed),
            limit=limit,
            num_pictures=pictures,
            workers=workers or os.cpu_count() or 1,
            progress=StageProgress(console, every_seconds=2.0),
        )
    table = Table("what", "found")
    for name, value in stats_rows(stats.tree):
        table.add_row(name, value)
    console.print(table)
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps(stats.tree, indent=1, ensure_ascii=False)
    write_text_whole(target / "stats.json", text + "\n")
    write_text_whole(target / "stats.html", stats_page(stats))
    console.print(f"{target / 'stats.html'}")
