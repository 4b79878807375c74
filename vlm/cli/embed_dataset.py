"""`vlm embed` of a dataset."""

import signal
import threading
import time
from pathlib import Path

import typer
from rich.console import Console

from vlm.cli.train import RESUME_ME
from vlm.config import validate_config

__all__ = ["embed_dataset"]

_SAID_EVERY_SECONDS = 10.0


def embed_dataset(
    shards: str,
    bundle: Path,
    out: Path,
    *,
    pods: int | None,
    dtype: str,
    batch_size: int,
    threads: int,
    max_bad: float,
    cache: Path | None,
) -> None:
    """Embed the images of a dataset into Parquet files, one a shard; run again, it goes on.

    Several processes share the work: each rank of torchrun, or each pod of an Indexed Job, takes
    its range of shards. SIGTERM gives up the part in progress and exits with 75, start me again.
    """
    from vlm.distributed import share_of_work  # noqa: PLC0415 - torch costs seconds
    from vlm.inference import Encoder  # noqa: PLC0415 - with it
    from vlm.inference.embed_shards import EmbedConfig, embed_shards  # noqa: PLC0415 - with it

    tree = {
        "dtype": dtype,
        "batch_size": batch_size,
        "threads": threads,
        "max_bad_fraction": max_bad,
        "remote": {} if cache is None else {"cache": cache},
    }
    config = validate_config(EmbedConfig, tree, source="options")
    share = share_of_work(pods=pods)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    encoder = Encoder.load(bundle, device=str(share.device))
    name = f"share {share.index + 1}/{share.count}"
    result = embed_shards(
        encoder,
        shards,
        out,
        share=share,
        config=config,
        stopping=stop.is_set,
        progress=_Lines(console, name),
    )
    console.print(
        f"{name}: {result.embedded} images embedded, {result.skipped} were there already, "
        f"{result.bad} cannot be decoded: {out}"
    )
    if result.stopped:
        console.print(f"{name}: stopped; the same command goes on")
        raise typer.Exit(RESUME_ME)
    if result.complete:
        console.print(f"all shares are done: {out}/embeddings.json")


class _Lines:
    """Says how far a share is, from time to time."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < _SAID_EVERY_SECONDS and done < total:
            return
        self._last = now
        rate = done / max(now - self._start, 1e-9)
        self._console.print(
            f"{self._name}: {done}/{total} images, {rate:.0f} images/s, "
            f"ETA {(total - done) / rate:.0f} s"
        )
