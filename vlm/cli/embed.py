"""`vlm embed`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlm.cli.asking import Bundle, Key, KeyFile, Server, client_of, decoded
from vlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["embed"]


def embed(
    images: Annotated[list[Path] | None, typer.Argument(help="Image files.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .npy file for the rows; default: JSON lines, printed.")
    ] = None,
    bundle: Bundle = Path("runs/demo/bundle"),
    server: Server = None,
    key_file: KeyFile = None,
    key: Key = None,
) -> None:
    """Embed image files and texts as unit rows: first the images, then the texts, in order."""
    files, texts = images or [], text or []
    if not files and not texts:
        message = "nothing to embed: name image files, or --text 'a red apple'"
        raise ConfigError(message)
    if out is not None and out.suffix != ".npy":
        message = f"--out {out}: rows are written as .npy"
        raise ConfigError(message)
    for path in files:
        if path.is_dir():
            message = f"{path}: a folder; embed takes image files (PATH/*.jpg)"
            raise DataError(message)
    if server is None:
        rows = _in_process(bundle, files, texts)
    else:
        with client_of(server, key, key_file) as client:
            rows = client.embed([*files, *texts])
    _write([*map(str, files), *texts], rows, out)


def _in_process(bundle: Path, files: list[Path], texts: list[str]) -> "np.ndarray":
    import numpy as np  # noqa: PLC0415 - with torch

    from vlm.inference import Encoder  # noqa: PLC0415 - torch costs seconds

    pixels = [decoded(path) for path in files]
    encoder = Encoder.load(bundle)
    return np.concatenate([encoder.encode_images(pixels), encoder.encode_texts(texts)])


def _write(names: list[str], rows: "np.ndarray", out: Path | None) -> None:
    import numpy as np  # noqa: PLC0415 - with torch

    from vlm.files import open_whole  # noqa: PLC0415 - with it

    if out is None:
        for name, row in zip(names, rows, strict=True):
            values = [round(float(value), 6) for value in row]
            typer.echo(json.dumps({"input": name, "embedding": values}))
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_whole(out) as file:
        np.save(file, rows.astype(np.float32), allow_pickle=False)
    Console(soft_wrap=True, highlight=False).print(f"{len(rows)} rows of {rows.shape[1]}: {out}")
