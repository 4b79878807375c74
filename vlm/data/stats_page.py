"""The page of `vlm data stats`: one HTML file that loads nothing from elsewhere."""

import base64
from collections.abc import Iterable
from html import escape
from typing import Any, Final

from vlm.data.stats import DatasetStats

__all__ = ["stats_page", "stats_rows"]

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5f5f68; --line: #d9d9e0;
  --paper: #fff; --bar: #2b6bd9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --soft: #a8a8b2; --line: #3a3a42; --paper: #16161a; --bar: #6fa0ff } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 0 0 .25rem }
p, figcaption, small { color: var(--soft); overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% }
td { text-align: left; padding: .25rem .5rem; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
td:last-child { text-align: right }
.grid { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)) }
.pictures { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)) }
figure { margin: 0 }
figure img { width: 100%; height: 8rem; object-fit: contain; background: #fff;
  border: 1px solid var(--line); border-radius: .4rem }
svg { width: 100%; height: 6rem; display: block }
rect { fill: var(--bar) }
figcaption { font-size: .85rem }
"""
_TITLES: Final = {
    "width": "Width, pixels",
    "height": "Height, pixels",
    "aspect": "Width over height",
    "megapixels": "Megapixels",
    "image_bytes": "Bytes of an image file",
    "caption_characters": "Characters of a caption",
    "caption_words": "Words of a caption",
}
_LISTS: Final = {
    "languages": "Languages",
    "formats": "Image formats",
    "captions": "Most frequent captions",
    "words": "Words, by captions that have them",
    "fields": "Fields of the metadata",
    "unusable": "Unusable, and why",
}


def stats_rows(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """The table at the top of the page, and of the terminal."""
    duplicates = tree["duplicates"]
    read = "" if tree["num_read"] == tree["num_samples"] else f" of {tree['num_samples']:,}"
    rows = [
        ("samples read", f"{tree['num_read']:,}{read}"),
        ("shards", f"{tree['num_shards']:,}, {tree['num_bytes'] / 1e6:,.1f} MB"),
        ("unusable", f"{tree['num_unusable']:,}"),
        ("empty captions", f"{tree['num_empty_captions']:,}"),
        ("images that repeat another's bytes", f"{duplicates['images']:,}"),
        ("images that look like another", f"{duplicates['images_alike']:,}"),
        ("captions that repeat another", f"{duplicates['captions']:,}"),
        ("pairs that repeat another", f"{duplicates['pairs']:,}"),
    ]
    for name, spread in tree["numbers"].items():
        five, half, most = (_short(spread["quantiles"][q]) for q in ("0.05", "0.5", "0.95"))
        rows.append((f"{_TITLES[name].lower()}: 5%, median, 95%", f"{five}, {half}, {most}"))
    languages = ", ".join(f"{name} {count:,}" for name, count in tree["counts"]["languages"][:5])
    return [*rows, ("languages", languages or "-")]


def stats_page(stats: DatasetStats) -> str:
    """The whole page."""
    tree = stats.tree
    plots = "".join(_plot(_TITLES[name], spread) for name, spread in tree["numbers"].items())
    lists = "".join(_list(title, tree["counts"][name]) for name, title in _LISTS.items())
    pictures = "".join(_picture(*picture) for picture in stats.pictures)
    table = _table(stats_rows(tree))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(tree['folder'])}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(tree['folder'])}</h1><p>fingerprint {escape(tree['fingerprint'][:12])}</p>"
        f"{table}<h2>How they spread</h2>"
        f'<div class="grid">{plots}</div><h2>What there is most of</h2>'
        f'<div class="grid">{lists}</div><h2>Samples drawn at random</h2>'
        f'<div class="pictures">{pictures}</div></main></body></html>\n'
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{lines}</table>"


def _list(title: str, counts: list[list[Any]]) -> str:
    if not counts:
        return ""
    rows = [(str(text)[:200] or "(empty)", f"{count:,}") for text, count in counts]
    return f"<section><h3>{escape(title)}</h3>{_table(rows)}</section>"


def _plot(title: str, spread: dict[str, Any]) -> str:
    counts, edges = spread["histogram"]["counts"], spread["histogram"]["edges"]
    most = max(counts) or 1
    bars = "".join(
        f'<rect x="{place}" y="{100 - 100 * count / most:.2f}" width="0.9" '
        f'height="{100 * count / most:.2f}"><title>{_short(edges[place])} to '
        f"{_short(edges[place + 1])}: {count:,}</title></rect>"
        for place, count in enumerate(counts)
    )
    return (
        f'<figure><h3>{escape(title)}</h3><svg viewBox="0 0 {len(counts)} 100" role="img" '
        f'preserveAspectRatio="none" aria-label="Histogram: {escape(title)}">{bars}</svg>'
        f"<figcaption>{_range(edges)}; mean {_short(spread['mean'])}</figcaption></figure>"
    )


def _range(edges: list[float]) -> str:
    if edges[0] == edges[-1]:
        return f"all {_short(edges[0])}"
    return f"{_short(edges[0])} to {_short(edges[-1])} and above"


def _picture(key: str, caption: str, webp: bytes) -> str:
    data = base64.b64encode(webp).decode()
    return (
        f'<figure><img alt="{escape(caption, quote=True)}" src="data:image/webp;base64,{data}">'
        f"<figcaption>{escape(caption) or '(no caption)'}<br><small>{escape(key)}</small>"
        f"</figcaption></figure>"
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
