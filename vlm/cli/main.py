"""The verbs put together, and what an error looks like to a person.

Exit codes: 0 done; 1 a defect of ours, with a traceback; 2 something the user can fix; 75 stopped
by a signal with everything saved, run it again with --resume; 130 interrupted.
"""

import sys

import typer
from rich.console import Console

import vlm
from vlm.cli.bench_serve import bench_serve
from vlm.cli.bundle import app as bundle_app
from vlm.cli.caption import caption
from vlm.cli.classify import classify
from vlm.cli.data import app as data_app
from vlm.cli.doctor import doctor
from vlm.cli.embed import embed
from vlm.cli.evaluate import evaluate
from vlm.cli.export import export
from vlm.cli.index import app as index_app
from vlm.cli.k8s import app as k8s_app
from vlm.cli.metrics import metrics
from vlm.cli.migrate import migrate
from vlm.cli.move import move_collection
from vlm.cli.refine import refine
from vlm.cli.runs import runs
from vlm.cli.scale import app as scale_app
from vlm.cli.search import search
from vlm.cli.serve import serve
from vlm.cli.snapshots import restore, snapshot, snapshots
from vlm.cli.soup import soup
from vlm.cli.train import train
from vlm.errors import VlmError
from vlm.openmp import let_idle_threads_sleep

__all__ = ["main"]

app = typer.Typer(
    name="vlm",
    help="Train vision-language dual encoders, evaluate, export, index and serve them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(bundle_app, name="bundle")
for index_verb in (migrate, snapshot, snapshots, restore):
    index_app.command()(index_verb)
index_app.command("move")(move_collection)
app.add_typer(index_app, name="index")
app.add_typer(k8s_app, name="k8s")
app.add_typer(scale_app, name="scale")
for verb in (
    doctor, train, runs, evaluate, refine, soup, export, caption,
    classify, embed, search, serve, bench_serve, metrics,
):  # fmt: skip
    app.command()(verb)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(vlm.__version__)


def main() -> None:
    """Run the command line; errors that a person can fix are printed without a traceback."""
    let_idle_threads_sleep()
    try:
        app()
    except VlmError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]error:[/] {_escaped(str(error))}", highlight=False
        )
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing half-written was left")
        sys.exit(130)


def _escaped(text: str) -> str:
    """Rich would read square brackets as markup."""
    return text.replace("[", r"\[")
