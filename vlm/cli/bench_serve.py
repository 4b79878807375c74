"""`vlm bench-serve`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlm.cli.asking import Key, KeyFile, key_of
from vlm.cli.bench_load import Tally, image_bodies, load, pace, text_bodies
from vlm.errors import ConfigError

__all__ = ["bench_serve"]


def bench_serve(
    server: Annotated[str, typer.Argument(help="E.g. http://127.0.0.1:8000.")],
    concurrency: Annotated[str, typer.Option(help="Requests at once, several runs.")] = "1,8,32",
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Of each run.")] = 5,
    rate: Annotated[
        float | None,
        typer.Option(min=0.1, help="Requests a second, due at random moments, whatever is open."),
    ] = None,
    texts: Annotated[bool, typer.Option(help="Texts in place of images.")] = False,
    out: Annotated[Path | None, typer.Option(help="The figures as JSON.")] = None,
    key_file: KeyFile = None,
    key: Key = None,
) -> None:
    """Ask SERVER for embeddings, one input a request, and tell how it does.

    Without a pause, as many at once as --concurrency says, or with --rate that many a second.

    All inputs differ, so that no cache answers. Only ask a server that is yours.
    """
    runs = _runs(concurrency)
    make = text_bodies() if texts else image_bodies()
    token = key_of(key, key_file)
    table = Table("at once", "answers/s", "p50 ms", "p99 ms", "busy")
    report: dict[str, Any] = {"server": server, "inputs": "texts" if texts else "images"}
    for count in runs if rate is None else (None,):
        tally = Tally()
        if count is None:
            assert rate is not None
            pace(server, make, rate=rate, seconds=seconds, tally=tally, key=token)
        else:
            load(server, make, concurrency=count, seconds=seconds, tally=tally, key=token)
        name = f"{rate:g} a second" if count is None else str(count)
        figures = tally.figures()
        report[name] = {**figures, "refused": tally.refused}
        table.add_row(name, *(f"{v:.1f}" for v in figures.values()), str(tally.refused))
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _runs(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 1024 for part in parts):
        message = f"--concurrency {text!r}: expected numbers from 1 to 1024, e.g. 1,8,32"
        raise ConfigError(message)
    return [int(part) for part in parts]
