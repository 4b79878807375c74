"""`vlm classify`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm.answers import Label, Shown
from vlm.cli.asking import Bundle, Key, KeyFile, Server, client_of, decoded
from vlm.errors import ConfigError

__all__ = ["classify"]


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    labels: Annotated[str | None, typer.Option(help="Labels, separated by commas.")] = None,
    label_set: Annotated[str | None, typer.Option(help="A label set of the server.")] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt with {} for the label, or plain, photo or drawing; may be repeated."
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1)] = 5,
    bundle: Bundle = Path("runs/demo/bundle"),
    server: Server = None,
    key_file: KeyFile = None,
    key: Key = None,
) -> None:
    """Say which of the labels each image shows, with probabilities."""
    if labels is not None and label_set is not None:
        message = "--labels and --label-set: give one of them"
        raise ConfigError(message)
    if labels is None and label_set is None:
        message = "say what to choose from: --labels 'red apple,tomato', or --label-set NAME"
        raise ConfigError(message)
    if label_set is not None and server is None:
        message = "label sets are kept by a server: --server URL"
        raise ConfigError(message)
    names = [name.strip() for name in (labels or "").split(",") if name.strip()]
    if labels is not None and not names:
        message = "--labels holds no label"
        raise ConfigError(message)
    if server is None:
        results = _in_process(bundle, images, names, template or ["{}"], top_k)
    else:
        chosen = {"label_set": label_set} if label_set else {"labels": names}
        with client_of(server, key, key_file) as client:
            results = client.classify(
                images, **chosen, **({"templates": template} if template else {}), top_k=top_k
            )
    _tell(images, results)


def _in_process(
    bundle: Path, images: list[Path], labels: list[str], templates: list[str], top_k: int
) -> list[Shown]:
    from vlm.inference import (  # noqa: PLC0415 - torch costs seconds
        Encoder,
        class_embeddings,
        doubled_label,
        exclusive_probabilities,
        expanded_templates,
        fill_templates,
    )

    if (doubled := doubled_label(labels)) is not None:
        message = f"--labels: {doubled!r} is given twice"
        raise ConfigError(message)
    try:
        prompts = [fill_templates(label, expanded_templates(templates)) for label in labels]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    pixels = [decoded(path) for path in images]
    encoder = Encoder.load(bundle)
    classes = class_embeddings(encoder.encode_texts, prompts)
    cosines = encoder.encode_images(pixels) @ classes.T
    table = exclusive_probabilities(cosines, encoder.info.logit_scale)
    return [
        Shown(
            labels=[
                Label(
                    label=labels[column],
                    probability=float(probabilities[column]),
                    score=float(scores[column]),
                )
                for column in (-probabilities).argsort(kind="stable")[:top_k].tolist()
            ],
            none_of_these=None,
        )
        for scores, probabilities in zip(cosines, table, strict=True)
    ]


def _tell(images: list[Path], results: list[Shown]) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for path, result in zip(images, results, strict=True):
        none = " (none of these)" if result.none_of_these else ""
        console.print(f"{path}:{none}")
        for entry in result.labels:
            console.print(f"  {entry.probability:6.1%}  {entry.label}")
