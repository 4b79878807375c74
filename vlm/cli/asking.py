"""What verbs that ask a model share: a server, or a bundle in this process."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from vlm.client import Client

__all__ = ["Bundle", "Key", "KeyFile", "Server", "client_of", "decoded", "key_of"]

Bundle = Annotated[
    Path, typer.Option(help="The model, in this process; see --server for another way.")
]
Server = Annotated[
    str | None, typer.Option(help="Ask this server instead, e.g. http://127.0.0.1:8000.")
]
KeyFile = Annotated[Path | None, typer.Option(help="File that holds the server's API key.")]
Key = Annotated[
    str | None,
    typer.Option(
        envvar="VLM_API_KEY", hidden=True, help="The server's API key; better by VLM_API_KEY."
    ),
]


def client_of(server: str, key: str | None, key_file: Path | None) -> "Client":
    """A client of a server, with the key of a file or of the environment; ConfigError if unread."""
    from vlm.client import Client  # noqa: PLC0415 - the `serve` extra may be missing

    return Client(server, key=key_of(key, key_file))


def key_of(key: str | None, key_file: Path | None) -> str | None:
    """The key of a file, if one is named, or the one given.

    Raises:
        ConfigError: If the file cannot be read, or holds no text.
    """
    if key_file is None:
        return key
    try:
        return key_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        message = f"{key_file}: the key cannot be read ({error.strerror})"
        raise ConfigError(message) from error
    except UnicodeDecodeError as error:
        message = f"{key_file}: the key cannot be read (not UTF-8 text); a key is printable ASCII"
        raise ConfigError(message) from error


def decoded(path: Path) -> "np.ndarray":
    """The pixels of an image file; DataError names it if it is none."""
    from vlm.preprocess import decode_image  # noqa: PLC0415 - torch costs seconds

    try:
        return decode_image(path.read_bytes())
    except (OSError, DataError) as error:
        message = f"{path}: cannot be read as an image ({error})"
        raise DataError(message) from error
