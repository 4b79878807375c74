"""Line charts as SVG text, cheap enough to draw while training."""

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

__all__ = ["chart"]

_WIDTH, _HEIGHT = 360, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 8, 22
_COLOURS = ("#3b6ea8", "#c4682b", "#2b8a4b", "#8a4b9c", "#a33b3b", "#4a8f99", "#8c7a1f", "#666")
_MOST_POINTS = 400

Points = Sequence[tuple[float, float]]


def chart(lines: Mapping[str, Points], *, label: str) -> Markup:
    """One chart of named lines over steps; points that are not finite are left out.

    Returns:
        An `<svg>` and a legend with the last value of every line.
    """
    kept: dict[str, Points] = {}
    for name, points in lines.items():
        finite = [point for point in points if all(map(math.isfinite, point))]
        if finite:
            kept[name] = _thinned(finite)
    if not kept:
        return Markup("<p>nothing to draw yet</p>")
    place, marks = _axes(kept)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts.extend(marks)
    legend = []
    for colour, (name, points) in zip(_cycled(len(kept)), kept.items(), strict=True):
        value = _number(points[-1][1])
        title = f"<title>{escape(name)}: {value}</title>"
        places = [place(x, y) for x, y in points]
        if len(places) == 1:
            across, down = places[0].split(",")
            parts.append(
                f'<circle cx="{across}" cy="{down}" r="3" fill="{colour}">{title}</circle>'
            )
        else:
            drawn = f'<polyline class="line" stroke="{colour}" points="{" ".join(places)}">'
            parts.append(f"{drawn}{title}</polyline>")
        legend.append(
            f'<span><i style="background:{colour}"></i>{escape(name)} <b>{value}</b></span>'
        )
    return Markup("".join([*parts, '</svg><div class="legend">', *legend, "</div>"]))


def _axes(lines: Mapping[str, Points]) -> tuple[Callable[[float, float], str], list[str]]:
    """Where a point goes, as "across,down", and the axes' lines and numbers."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    left, right = min(xs), max(max(xs), min(xs) + 1)
    low, high = _range(min(ys), max(ys))

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    marks = []
    for share in (0.0, 0.5, 1.0):
        y = low + share * (high - low)
        start, end = place(left, y), place(right, y)
        down = start.split(",")[1]
        marks.append(f'<polyline class="grid" points="{start} {end}"/>')
        marks.append(f'<text x="{_LEFT - 5}" y="{down}" dy=".3em" class="y">{_number(y)}</text>')
    for x, side in ((left, "start"), (right, "end")):
        across = place(x, low).split(",")[0]
        marks.append(
            f'<text x="{across}" y="{_HEIGHT - 6}" text-anchor="{side}">{_number(x)}</text>'
        )
    return place, marks


def _cycled(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _thinned(points: Points) -> Points:
    """At most so many points, the last among them."""
    stride = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:stride], points[-1]]


def _range(low: float, high: float) -> tuple[float, float]:
    """Limits with some room, never of no height; what is never negative begins at 0 at least."""
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.1e}"
    if value == round(value) and abs(value) >= 10:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
