"""`vlm search`."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml
from rich.console import Console

from vlm.answers import Found
from vlm.cli.asking import Bundle, Key, KeyFile, Server, client_of, decoded
from vlm.cli.index import Index, opened_catalog, store_errors
from vlm.errors import ConfigError, DataError

__all__ = ["search"]

_IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""Of what cannot be meant as words."""


class _Values(yaml.SafeLoader):
    """YAML without dates, which no filter knows, and without numbers to the base of 60."""

    def keep_text(self, node: Any) -> str:
        return str(node.value)

    def number_or_time(self, node: Any) -> int | float | str:
        """10:30 is a time of day to whoever types it, and 630 in YAML 1.1."""
        if ":" in node.value:
            return self.keep_text(node)
        is_whole = node.tag.endswith(":int")
        number: int | float = (
            self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)
        )
        return number


_Values.add_constructor("tag:yaml.org,2002:timestamp", _Values.keep_text)
for _tag in ("int", "float"):
    _Values.add_constructor(f"tag:yaml.org,2002:{_tag}", _Values.number_or_time)


def search(
    query: Annotated[
        str | None, typer.Argument(help="What the pictures should show, or an image file.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Pictures like this one, instead.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 10,
    where: Annotated[
        list[str] | None, typer.Option(help="key=value of the metadata; may be repeated.")
    ] = None,
    bundle: Bundle = Path("runs/demo/bundle"),
    index: Index = None,
    server: Server = None,
    key_file: KeyFile = None,
    key: Key = None,
) -> None:
    """Find stored pictures by words or by a picture, best first."""
    if (query is None) == (image is None):
        message = "say what to look for: words, or --image FILE"
        raise ConfigError(message)
    if query is not None and Path(query).suffix.lower() in _IMAGE_SUFFIXES:
        image, query = Path(query), None
    wanted = _filter(where or [])
    asked = query if image is None else image
    assert asked is not None
    if server is None:
        found = _in_process(bundle, index or bundle.parent / "index", asked, limit, wanted)
    else:
        with client_of(server, key, key_file) as client:
            found = client.search(asked, limit=limit, filter=wanted)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for hit in found:
        console.print(f"{hit.score:.4f}  {hit.id}  {hit.text or ''}".rstrip())
    if not found:
        console.print("nothing found")


def _filter(pairs: list[str]) -> dict[str, Any]:
    """Values are read as YAML: true, 3 and words; dates and times of day stay texts."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            message = f"--where {pair!r}: expected key=value"
            raise ConfigError(message)
        try:
            found[name] = yaml.load(value, _Values)
        except (yaml.YAMLError, ValueError, LookupError) as error:  # YAML's own constructors
            message = (
                f"--where {pair!r}: {value!r} is not valid YAML; expected true, 3, words, or "
                f"operators such as {{gte: 3}}; put quotes around a text with other signs"
            )
            raise ConfigError(message) from error
    return found


@store_errors()
def _in_process(
    bundle: Path, index: Path, asked: str | Path, limit: int, wanted: dict[str, Any]
) -> list[Found]:
    from serving.services.asking import ask  # noqa: PLC0415 - `serve` extra
    from serving.stores import DEFAULT, parse_filter  # noqa: PLC0415 - with it
    from vlm.inference import Encoder  # noqa: PLC0415 - torch costs seconds

    catalog = opened_catalog(index)
    known = catalog.find(DEFAULT)
    if known is None:
        message = f"{index}: no collection; make one: vlm index SHARDS --bundle {bundle}"
        raise DataError(message)
    if isinstance(asked, Path):
        decoded(asked)  # says what is wrong with a file
    encoder = Encoder.load(bundle)
    store = catalog.open(known.name, fingerprint=encoder.fingerprint, dim=encoder.dim)
    hits = ask(
        encoder,
        store,
        asked if isinstance(asked, str) else asked.read_bytes(),
        limit=limit,
        where=parse_filter(wanted),
        note=known.note,
    )
    return [Found(id=h.id, score=h.score, text=h.text, metadata=h.metadata) for h in hits]
