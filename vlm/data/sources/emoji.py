"""Real image-text pairs from emoji drawings that npm packages carry.

One concept (a Unicode emoji without skin tone) is drawn once by each style. The caption is its
name; tags come from emojibase. Two things are held out of training, and `split_of` is the only
place that decides it:

- Fluent styles, a domain shift in drawing style;
- 20% of the concepts, chosen by a hash of the concept id, whatever the style.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

__all__ = [
    "CONCEPTS_PACKAGE",
    "SPLIT_RULE",
    "STYLES",
    "Concept",
    "Drawing",
    "Style",
    "drawings_of",
    "is_unseen_concept",
    "read_concepts",
    "split_of",
]

CONCEPTS_PACKAGE: Final = "emojibase-data@17.0.0"
UNSEEN_CONCEPT_FRACTION: Final = 0.2
SPLIT_RULE: Final = "sha512 of the concept id below 0.2; Fluent styles"

Split = Literal[
    "train", "unseen_concepts", "unseen_style_seen_concepts", "unseen_style_unseen_concepts"
]


@dataclass(frozen=True, kw_only=True)
class Style:
    """One set of drawings, from one npm package of Iconify's JSON form."""

    name: str
    package: str
    license: str
    author: str
    url: str
    held_out: bool = False


def _iconify(
    name: str, set_name: str, version: str, license_: str, author: str, url: str, **more: bool
) -> Style:
    return Style(
        name=name,
        package=f"@iconify-json/{set_name}@{version}",
        license=license_,
        author=author,
        url=f"https://github.com/{url}",
        **more,
    )


STYLES: Final = {
    style.name: style
    for style in [
        _iconify(
            "openmoji", "openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji", "hfg-gmuend/openmoji"
        ),
        _iconify("noto", "noto", "1.2.9", "Apache-2.0", "Google Inc", "googlefonts/noto-emoji"),
        _iconify(
            "noto_v1", "noto-v1", "1.2.5", "Apache-2.0", "Google Inc", "googlefonts/noto-emoji"
        ),
        _iconify(
            "twemoji", "twemoji", "1.2.5", "CC-BY-4.0", "Twitter and jdecked", "jdecked/twemoji"
        ),
        _iconify("emojione", "emojione", "1.2.3", "CC-BY-4.0", "Emoji One", "EmojiTwo/emojitwo"),
        _iconify(
            "emojione_v1",
            "emojione-v1",
            "1.2.3",
            "CC-BY-SA-4.0",
            "Emoji One",
            "joypixels/emojione-legacy",
        ),
        _iconify("fxemoji", "fxemoji", "1.2.2", "Apache-2.0", "Mozilla", "mozilla/fxemoji"),
        _iconify(
            "fluent_flat",
            "fluent-emoji-flat",
            "1.2.6",
            "MIT",
            "Microsoft Corporation",
            "microsoft/fluentui-emoji",
            held_out=True,
        ),
        _iconify(
            "fluent_3d",
            "fluent-emoji",
            "1.2.7",
            "MIT",
            "Microsoft Corporation",
            "microsoft/fluentui-emoji",
            held_out=True,
        ),
    ]
}


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One thing that styles draw: `id` is the Unicode sequence in hex, without variation marks."""

    id: str
    name: str
    tags: tuple[str, ...]
    aliases: tuple[str, ...]
    """Normalised names, best first, to find the drawing in styles that go by name only."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One style's picture of one concept."""

    concept: Concept
    style: Style
    svg: str


def is_unseen_concept(concept_id: str) -> bool:
    """Whether this concept is held out everywhere; a pure function of the id.

    Under SHA-512 the things that the page's example queries ask for are seen concepts.
    """
    digest = hashlib.sha512(concept_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < UNSEEN_CONCEPT_FRACTION * 2**64


def split_of(style: Style, concept_id: str) -> Split:
    """The split a drawing belongs to; only `train` may reach training."""
    unseen = is_unseen_concept(concept_id)
    if style.held_out:
        return "unseen_style_unseen_concepts" if unseen else "unseen_style_seen_concepts"
    return "unseen_concepts" if unseen else "train"


def read_concepts(package: Path) -> list[Concept]:
    """Concepts of an unpacked emojibase-data package: everything but lone regional letters."""
    entries = json.loads((package / "en" / "data.json").read_text(encoding="utf-8"))
    shortcodes: dict[str, set[str]] = {}
    for path in sorted((package / "en" / "shortcodes").glob("*.json")):
        for hexcode, names in json.loads(path.read_text(encoding="utf-8")).items():
            found = [names] if isinstance(names, str) else names
            shortcodes.setdefault(_concept_id(hexcode), set()).update(found)
    return [_concept(entry, shortcodes) for entry in entries if "group" in entry]


def _concept(entry: dict[str, Any], shortcodes: dict[str, set[str]]) -> Concept:
    concept_id = _concept_id(entry["hexcode"])
    names = [entry["label"]]
    if "-" not in concept_id:
        names.append(unicodedata.name(chr(int(concept_id, 16)), entry["label"]))
    names += sorted(shortcodes.get(concept_id, ()))
    return Concept(
        id=concept_id,
        name=_spoken(entry["label"]),
        tags=tuple(_spoken(tag) for tag in entry.get("tags", ())),
        aliases=tuple(dict.fromkeys(_normalised(name) for name in names)),
    )


def drawings_of(style: Style, package: Path, concepts: list[Concept]) -> Iterator[Drawing]:
    """This style's drawings of the given concepts, at most one each, in the order of concepts."""
    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    chars_path = package / "chars.json"
    chars = json.loads(chars_path.read_text(encoding="utf-8")) if chars_path.is_file() else {}
    by_id = {_concept_id(hexcode): name for hexcode, name in chars.items()}
    by_name = {_normalised(name): name for name in [*icons.get("aliases", {}), *icons["icons"]]}
    for concept in concepts:
        name = by_id.get(concept.id)
        if name is None and not by_id:  # a style that knows no code points: go by its names
            name = next((by_name[alias] for alias in concept.aliases if alias in by_name), None)
        if name is not None and (svg := _svg(icons, name)) is not None:
            yield Drawing(concept=concept, style=style, svg=svg)


def _svg(icons: dict[str, Any], name: str) -> str | None:
    """A standalone SVG of one Iconify icon; aliases are followed to their parent."""
    aliases = icons.get("aliases", {})
    while name in aliases:
        if set(aliases[name]) & {"hFlip", "vFlip", "rotate"}:
            return None  # a mirrored drawing of something else is not this concept's drawing
        name = aliases[name]["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
        f"{icon['body']}</svg>"
    )


def _concept_id(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _normalised(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _spoken(text: str) -> str:
    """A caption as people would type it: curly quotes straightened, spaces collapsed."""
    return " ".join(text.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "").split())
