"""Names that stand for collections, in a file that is replaced as a whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["DEFAULT", "read_aliases", "write_aliases"]

DEFAULT: Final = "default"
"""The collection of requests that name none."""
_ALIASES: Final = "aliases.json"


def read_aliases(root: Path) -> dict[str, str]:
    """Names that stand for collections in a folder."""
    try:
        found: dict[str, str] = json.loads((root / _ALIASES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def write_aliases(root: Path, aliases: Mapping[str, str]) -> None:
    """Replace all of them at once."""
    root.mkdir(parents=True, exist_ok=True)
    draft = root / f".{_ALIASES}.draft"
    draft.write_text(json.dumps(dict(sorted(aliases.items())), indent=1), encoding="utf-8")
    draft.replace(root / _ALIASES)
