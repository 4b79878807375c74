"""`vlm caption`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm.errors import DataError

__all__ = ["caption"]


class Search(StrEnum):
    """How tokens are chosen."""

    greedy = "greedy"
    beam = "beam"
    nucleus = "nucleus"
    contrastive = "contrastive"


def caption(
    bundle: Annotated[Path, typer.Argument(help="The bundle of a CoCa, e.g. runs/x/bundle.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    search: Annotated[Search, typer.Option(help="How tokens are chosen.")] = Search.beam,
    seed: Annotated[int, typer.Option(help="Of nucleus sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, …")] = "cpu",
) -> None:
    """Write a caption for each image."""
    from pydantic import TypeAdapter  # noqa: PLC0415 - with torch

    from vlm.inference import Captioner, Strategy  # noqa: PLC0415 - torch costs seconds
    from vlm.preprocess import decode_image  # noqa: PLC0415 - with it

    decoded = []
    for path in images:
        try:
            decoded.append(decode_image(path.read_bytes()))
        except (OSError, DataError) as error:
            message = f"{path}: cannot be read as an image ({error})"
            raise DataError(message) from error
    strategy = TypeAdapter(Strategy).validate_python({"type": search.value})
    captions = Captioner.load(bundle, device=device).caption(decoded, strategy, seed=seed)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for path, text in zip(images, captions, strict=True):
        console.print(f"{path}: {text}")
