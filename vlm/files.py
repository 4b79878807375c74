"""Files that appear whole or not at all."""

from pathlib import Path

__all__ = ["write_text_whole"]


def write_text_whole(path: Path, text: str) -> None:
    """Write UTF-8 text under a hidden name, then rename it over `path`."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
