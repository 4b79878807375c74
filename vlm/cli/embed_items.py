"""`vlm embed` of image files and texts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from vlm.cli.asking import decoded
from vlm.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from vlm.client import Client

__all__ = ["embed_items"]


def embed_items(
    files: list[Path], texts: list[str], out: Path | None, *, bundle: Path, client: "Client | None"
) -> None:
    """Embed image files and texts as unit rows: first the images, then the texts, in order.

    Args:
        files: Image files.
        texts: With them at least one.
        out: A .npy file; none: JSON lines are printed.
        bundle: The model, in this process.
        client: Of a server that is asked instead.

    Raises:
        ConfigError: If `out` is no .npy file.
        DataError: If a file is no image.
    """
    if out is not None and out.suffix != ".npy":
        message = f"--out {out}: rows are written as .npy"
        raise ConfigError(message)
    if client is None:
        rows = _in_process(bundle, files, texts)
    else:
        with client:
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
