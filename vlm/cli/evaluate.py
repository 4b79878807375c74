"""`vlm evaluate`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
import yaml
from rich.console import Console

from vlm.errors import ConfigError, VlmError
from vlm.files import write_text_whole

if TYPE_CHECKING:
    from vlm.evaluation import EvaluationConfig, Subject

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run folder, a bundle folder, or a model of open_clip: local-dir:FOLDER, "
            "hf-hub:OWNER/NAME, ARCHITECTURE/TAG."
        ),
    ],
    tasks: Annotated[
        list[str] | None, typer.Argument(help="TASKS.yaml …, then dotted.key=value …")
    ] = None,
    config: Annotated[list[Path] | None, typer.Option(help="A file of tasks, too.")] = None,
    against: Annotated[str | None, typer.Option(help="Compare with this model.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where evaluation.json and .html go; default: the run, or BUNDLE-evaluation."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda:0, …; default: the rank's own.")
    ] = None,
) -> None:
    """Measure MODEL on tasks, beside chance and with intervals; JSON and an HTML page.

    Under torchrun all ranks take part, with the same result. Exit code 0 whatever the verdict; 1 if
    a task could not be done, after the others were written.
    """
    from vlm.cli.device import usable_device  # noqa: PLC0415 - torch costs seconds
    from vlm.distributed import connected_world  # noqa: PLC0415 - torch costs seconds
    from vlm.evaluation import (  # noqa: PLC0415 - with torch and matplotlib
        compare,
        evaluate_with_evidence,
        print_comparison,
        print_summary,
        write_report,
    )

    kind = _kind(model)
    kinds = {model: kind} if against is None else {model: kind, against: _kind(against)}
    files, overrides = _sorted(tasks or [], config or [])
    settings = _load(files, overrides)
    folder = _folder(model, out)
    _require_writable(folder)
    console = Console()
    with connected_world() as world:
        where = str(world.device) if device is None else usable_device(device)

        def say(line: str) -> None:
            console.print(line, highlight=False, soft_wrap=True)

        subject = _subject(model, kind, where)
        other = None if against is None else _subject(against, kinds[against], where)
        with evaluate_with_evidence(subject, settings, world, say=say) as (found, evidence):
            comparison = None
            if other is not None:
                with evaluate_with_evidence(other, settings, world, say=say) as (theirs, their):
                    comparison = compare(found, evidence, theirs, their, seed=settings.seed)
            if not world.is_main:
                return
            write_text_whole(folder / "evaluation.json", found.model_dump_json(indent=2) + "\n")
            write_report(folder / "evaluation.html", found, settings, evidence, comparison)
        print_summary(found, console)
        written = [folder / "evaluation.json", folder / "evaluation.html"]
        if comparison is not None:
            written.append(folder / "comparison.json")
            write_text_whole(written[-1], comparison.model_dump_json(indent=2) + "\n")
            print_comparison(comparison, console)
        say(f"written: {', '.join(str(path) for path in written)}")
    failures = found.failures | (theirs.failures if comparison is not None else {})
    if failures:
        lines = [f"{key}: {why}" for key, why in failures.items()]
        raise VlmError("not every task could be done\n  " + "\n  ".join(lines))


def _sorted(tasks: Sequence[str], config: Sequence[Path]) -> tuple[list[Path], list[str]]:
    files, overrides = list(config), []
    for argument in tasks:
        if "=" in argument:
            overrides.append(argument)
        elif argument.endswith((".yaml", ".yml")):
            files.append(Path(argument))
        else:
            message = f"{argument!r}: expected a file TASKS.yaml or an override dotted.key=value"
            raise ConfigError(message)
    return files or [Path("configs/evaluate/emoji.yaml")], overrides


def _load(files: Sequence[Path], overrides: list[str]) -> "EvaluationConfig":
    """One configuration of all files: datasets and tasks are joined, other keys taken over."""
    from vlm.config import apply_overrides, load_config, validate_config  # noqa: PLC0415 - with it
    from vlm.evaluation import EvaluationConfig  # noqa: PLC0415 - torch costs seconds

    if len(files) == 1:
        return load_config(EvaluationConfig, files[0], overrides)
    joined: dict[str, object] = {}
    datasets: dict[str, object] = {}
    tasks: list[object] = []
    for path in files:
        load_config(EvaluationConfig, path, [])  # so that its mistakes are told with its name
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, dataset in tree.pop("datasets").items():
            if datasets.setdefault(name, dataset) != dataset:
                message = f"{path}: dataset {name!r} is another one in an earlier file; rename it"
                raise ConfigError(message)
        tasks += tree.pop("tasks")
        joined |= tree
    merged = {**joined, "datasets": datasets, "tasks": tasks}
    source = ", ".join(str(path) for path in files)
    return validate_config(EvaluationConfig, apply_overrides(merged, overrides), source=source)


def _kind(model: str) -> Literal["bundle", "run", "open_clip"]:
    path = Path(model)
    if (path / "bundle.json").is_file():
        return "bundle"
    if (path / "config.yaml").is_file():
        return "run"
    if not path.exists() and _of_open_clip(model):
        return "open_clip"
    message = (
        f"{model}: neither a run (config.yaml) nor a bundle (bundle.json), nor a model of "
        f"open_clip (local-dir:FOLDER, hf-hub:OWNER/NAME or ARCHITECTURE/TAG)"
    )
    raise VlmError(message)


def _of_open_clip(model: str) -> bool:
    if model.startswith(("local-dir:", "hf-hub:")):
        return True
    import open_clip  # noqa: PLC0415 - seconds, only its own models pay

    return model.partition("/")[0] in open_clip.list_models()


def _subject(model: str, kind: Literal["bundle", "run", "open_clip"], device: str) -> "Subject":
    from vlm.evaluation import (  # noqa: PLC0415 - torch costs seconds
        subject_of_bundle,
        subject_of_open_clip,
    )
    from vlm.inference import load_bundle  # noqa: PLC0415 - with it
    from vlm.train.export import load_run  # noqa: PLC0415 - with it

    if kind == "open_clip":
        return subject_of_open_clip(model, device=device)
    bundle = load_bundle(Path(model)) if kind == "bundle" else load_run(Path(model))
    return subject_of_bundle(bundle, device=device)


def _folder(model: str, out: Path | None) -> Path:
    path = Path(model)
    if out is not None:
        return out
    if model.startswith("local-dir:"):
        return _beside(Path(model.removeprefix("local-dir:")))
    if path.is_dir():
        return _beside(path) if (path / "bundle.json").is_file() else path
    return Path("runs") / model.replace("/", "-").replace(":", "-")


def _beside(bundle: Path) -> Path:
    """A bundle is immutable: its evaluation lies in its run, or in a folder beside it."""
    if (bundle.parent / "config.yaml").is_file():
        return bundle.parent
    whole = bundle.resolve()
    return (
        bundle.parent / f"{whole.name}-evaluation" if bundle.name else Path(f"{whole}-evaluation")
    )


def _require_writable(folder: Path) -> None:
    """Tell before the work, not after it, that its results have no place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = (
            f"{folder}: results cannot be written there ({error.strerror}); choose another --out"
        )
        raise VlmError(message) from error
