"""`vlm scale …`: plans past the machines at hand, as tables of `scale_formulas`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vlm.cli import scale_formulas as formulas
from vlm.cli.scale_formulas import Checkpointing

__all__ = ["app"]

_GPUS = (1, 8, 32, 128, 512, 1024)
_COUNTS = (10**6, 10**7, 10**8, 10**9, 10**10)
_NODE = 8

app = typer.Typer(help="Plans past the machines at hand; k8s/SCALE.md explains them.")


@app.command()
def train(
    parameters: Annotated[float, typer.Option(help="Of the model, in millions.")] = 151.0,
    gflops: Annotated[float, typer.Option(help="Forward and backward of a sample, 1e9.")] = 45.0,
    dim: Annotated[int, typer.Option(help="Of the embeddings.")] = 512,
    micro_batch: Annotated[int, typer.Option(help="Samples of a step on each GPU.")] = 256,
    samples: Annotated[float, typer.Option(help="Of the run, in billions.")] = 12.8,
    teraflops: Annotated[float, typer.Option(help="A GPU's, as far as it is used.")] = 200.0,
    loss_teraflops: Annotated[float, typer.Option(help="The same in float32.")] = 40.0,
    network: Annotated[float, typer.Option(help="Of a node, in GB/s.")] = 50.0,
    storage: Annotated[float, typer.Option(help="Writes of one rank, in GB/s.")] = 1.0,
    sample_kb: Annotated[float, typer.Option(help="A sample in a shard, in kB.")] = 30.0,
    decoded: Annotated[float, typer.Option(help="Samples/s that a core decodes.")] = 700.0,
    gpu_hours: Annotated[float, typer.Option(help="Between failures of one GPU.")] = 50_000.0,
    restart: Annotated[float, typer.Option(help="Seconds to start again.")] = 300.0,
    price: Annotated[float, typer.Option(help="Of a GPU's hour.")] = 2.5,
) -> None:
    """One run from 1 to 1,024 GPUs: step, traffic, loader, checkpoints, goodput, days and cost."""
    count = round(parameters * 1e6)
    saved = formulas.checkpoint_bytes(count, moments=1, ema=False)
    table = _table(
        "GPUs", "batch", "step ms", "of it loss", "of it net", "loss GB", "read GB/s",
        "cores/GPU", "save every", "goodput", "days", "cost",
    )  # fmt: skip
    for gpus in _GPUS:
        batch = gpus * micro_batch
        traffic = formulas.gather_traffic(batch, dim, ranks=gpus) + formulas.ring_traffic(
            formulas.gradient_bytes(count), gpus
        )
        # A ring leaves each node once; inside a node, links are not what limits.
        communicating = traffic / (network * 1e9) if gpus > _NODE else 0.0
        losing = formulas.loss_flops(batch, dim, ranks=gpus) / (loss_teraflops * 1e12)
        step = micro_batch * gflops * 1e9 / (teraflops * 1e12) + losing + communicating
        times = Checkpointing(
            save=saved / (storage * 1e9),
            restart=restart,
            between_failures=formulas.mean_seconds_between_failures(gpus, gpu_hours=gpu_hours),
        )
        interval = formulas.daly_interval(times)
        useful = formulas.goodput(times, interval)
        seconds = samples * 1e9 / batch * step / useful
        table.add_row(
            str(gpus), f"{batch:,}", f"{step * 1e3:.0f}", f"{losing / step:.0%}",
            f"{communicating / step:.0%}", f"{formulas.loss_memory(batch, dim) / 1e9:.2f}",
            f"{batch / step * sample_kb / 1e6:.2f}", f"{micro_batch / step / decoded:.1f}",
            f"{interval / 60:.0f} min", f"{useful:.2%}", f"{seconds / 86400:.1f}",
            f"{seconds / 3600 * gpus * price:,.0f}",
        )  # fmt: skip
    Console().print(table)


@app.command()
def search(
    dim: Annotated[int, typer.Option(help="Of the embeddings.")] = 512,
    queries: Annotated[float, typer.Option(help="A second, at the peak.")] = 100.0,
    memory_gb: Annotated[float, typer.Option(help="Of a node, for codes.")] = 256.0,
    bandwidth: Annotated[float, typer.Option(help="Of a node's memory, in GB/s.")] = 100.0,
    probed: Annotated[float, typer.Option(help="Part of the codes that a query reads.")] = 0.01,
) -> None:
    """One collection from a million to ten billion vectors: bytes, nodes, latency, replicas."""
    table = _table(
        "vectors",
        "disk GB",
        "codes GB",
        "nodes",
        "exact ms",
        "probed ms",
        "queries/s",
        "replicas",
        "Milvus GB",
    )
    for count in _COUNTS:
        vectors, codes = formulas.search_bytes(count, dim)
        nodes = max(1, -(-codes // round(memory_gb * 1e9)))
        exact = formulas.scan_seconds(vectors / nodes, bandwidth=bandwidth * 1e9)
        quick = formulas.scan_seconds(probed * codes / nodes, bandwidth=bandwidth * 1e9)
        each = 1 / max(quick, 1e-3)  # a request costs a millisecond whatever it reads
        needed = formulas.replicas(queries, each=each)
        table.add_row(
            f"{count:,}", f"{vectors / 1e9:,.0f}", f"{codes / 1e9:,.1f}", str(nodes),
            f"{exact * 1e3:,.0f}", f"{quick * 1e3:,.1f}", f"{each:,.0f}", str(needed),
            f"{formulas.milvus_bytes(count, dim) / 1e9:,.0f}",
        )  # fmt: skip
    Console().print(table)


@app.command()
def serve(
    images: Annotated[float, typer.Option(help="Embedded a second by a replica.")] = 20.0,
    texts: Annotated[float, typer.Option(help="Embedded a second by a replica.")] = 150.0,
    image_share: Annotated[float, typer.Option(min=0, max=1, help="Of the requests.")] = 0.2,
    utilisation: Annotated[float, typer.Option(help="At the peak.")] = 0.6,
    price: Annotated[float, typer.Option(help="Of a replica's hour.")] = 0.1,
) -> None:
    """Replicas of the server from ten to ten thousand requests a second."""
    each = 1 / (image_share / images + (1 - image_share) / texts)
    table = _table("requests/s", "each", "replicas", "cost/day")
    for rate in (10, 100, 1_000, 10_000):
        needed = formulas.replicas(rate, each=each, utilisation=utilisation)
        table.add_row(f"{rate:,}", f"{each:.0f}", f"{needed:,}", f"{needed * 24 * price:,.0f}")
    Console().print(table)


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right")
    return table
