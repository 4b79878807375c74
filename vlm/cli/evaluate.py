"""`vlm evaluate`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm.config import load_config
from vlm.errors import VlmError
from vlm.files import write_text_whole

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run folder or a bundle folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value")] = None,
    config: Annotated[Path, typer.Option(help="The tasks.")] = Path("configs/evaluate/emoji.yaml"),
    out: Annotated[
        Path | None, typer.Option(help="Where evaluation.json and .html go; default: MODEL.")
    ] = None,
) -> None:
    """Zero-shot accuracy, retrieval and geometry of MODEL, beside chance; JSON and an HTML page."""
    from vlm.evaluation import (  # noqa: PLC0415 - torch and matplotlib cost seconds
        EvaluationConfig,
        print_summary,
        write_report,
    )
    from vlm.evaluation import evaluate as run_tasks  # noqa: PLC0415 - with them
    from vlm.inference import Encoder, load_bundle  # noqa: PLC0415 - with them
    from vlm.train.export import load_run  # noqa: PLC0415 - with them

    is_bundle = (model / "bundle.json").is_file()
    if not is_bundle and not (model / "config.yaml").is_file():
        message = f"{model}: neither a run (config.yaml) nor a bundle (bundle.json)"
        raise VlmError(message)
    settings = load_config(EvaluationConfig, config, overrides or [])
    encoder = Encoder(load_bundle(model) if is_bundle else load_run(model))
    console = Console()
    evaluation, evidence = run_tasks(
        encoder, settings, say=lambda line: console.print(line, highlight=False, soft_wrap=True)
    )
    # A bundle is immutable, so its evaluation lies beside it.
    folder = out or (model.parent if is_bundle else model)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(folder / "evaluation.json", evaluation.model_dump_json(indent=2) + "\n")
    write_report(folder / "evaluation.html", evaluation, settings, evidence)
    print_summary(evaluation, console)
    console.print(
        f"written: {folder}/evaluation.json, {folder}/evaluation.html",
        highlight=False,
        soft_wrap=True,
    )
