"""How much of what exact search finds a collection's index finds, and how hard to search for that.

An index that is never compared with exact search, by queries like the real ones, is believed to
find what it misses: captions lie a modality gap away from the pictures that an index was made of.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal

import numpy as np

from serving.stores import Effort, Item, Store

__all__ = [
    "HELD_OUT",
    "Measurement",
    "Point",
    "QueryKind",
    "held_out_queries",
    "is_out_of_date",
    "measure",
    "read_measurement",
    "tune",
    "written",
]

QueryKind = Literal["text", "image", "mixed"]
Found = dict[QueryKind, list[set[str]]]
HELD_OUT: Final = 64
"""Queries of each kind."""
_LIMIT: Final = 10
_ENOUGH: Final = 0.999
_GROWTH: Final = 1.25
_REBUILD_GROWTH: Final = 4.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one effort finds, and how long it takes."""

    effort: Effort | None
    """None: exact search."""
    recall: dict[QueryKind, float]
    """Share of the 10 nearest that is found, 0 to 1, by kind of query."""
    milliseconds: float
    """Median of one search."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The curve of a collection at one size, and what was chosen from it."""

    items: int
    target: float
    queries: dict[QueryKind, int]
    curve: tuple[Point, ...]
    chosen: Point
    measured_at: float
    """Seconds since 1970."""

    @property
    def meets_target(self) -> bool:
        """Whether every kind of query finds enough."""
        return _worst(self.chosen) >= self.target

    @property
    def index_misses_target(self) -> bool:
        """Whether there is an index that finds too little at every effort."""
        indexed = [point for point in self.curve if point.effort is not None]
        return bool(indexed) and max(map(_worst, indexed)) < self.target


def held_out_queries(
    sample: Sequence[Item], encode_texts: Callable[[Sequence[str]], np.ndarray]
) -> dict[QueryKind, np.ndarray]:
    """Queries as people ask them, made of a sample of the collection.

    Args:
        sample: Items; of the images with a caption, the caption is asked for in words.
        encode_texts: To unit rows, float32 [text dim].

    Returns:
        Unit rows by kind; a kind that the sample cannot ask is left out. `mixed` is the sum of a
        picture and the caption of another one.
    """
    captioned = [item for item in sample if item.modality == "image" and (item.text or "").strip()]
    images = np.stack([i.vector for i in sample]) if sample else np.empty((0, 0), np.float32)
    queries: dict[QueryKind, np.ndarray] = {}
    if captioned:
        texts = encode_texts([item.text or "" for item in captioned])
        queries["text"] = texts
        mixed = np.stack([item.vector for item in captioned]) + np.roll(texts, 1, axis=0)
        norms = np.linalg.norm(mixed, axis=1, keepdims=True)
        queries["mixed"] = mixed / np.maximum(norms, 1e-12)
    if len(images):
        queries["image"] = images
    return queries


def is_out_of_date(store: Store, known: Measurement | None, *, exact_below: int) -> bool:
    """Whether a collection has outgrown what was measured of it; never where all is exact."""
    count = store.count()
    if count < exact_below or not store.efforts:
        return False
    return known is None or not store.is_indexed or count > _GROWTH * known.items


def tune(
    store: Store,
    queries: Mapping[QueryKind, np.ndarray],
    *,
    target: float,
    known: Measurement | None,
) -> Measurement:
    """Bring the index up to the size of the collection, and measure it."""
    if not store.is_indexed or known is None or store.count() > _REBUILD_GROWTH * known.items:
        store.build_index()
    store.optimize()
    return measure(store, queries, target=target)


def measure(store: Store, queries: Mapping[QueryKind, np.ndarray], *, target: float) -> Measurement:
    """The recall of a store's index against its own exact search.

    The least slow effort is chosen that reaches the target for every kind of query, by more than
    the standard error of so few of them; exact search if none does, or if it is no slower.
    """
    truth, milliseconds = _searched(store, queries, None)
    curve = [Point(effort=None, recall=_shares(truth, truth), milliseconds=milliseconds)]
    before: list[dict[QueryKind, float]] = []
    for efforts in store.efforts if store.is_indexed else ():
        for effort in efforts:
            found, milliseconds = _searched(store, queries, effort)
            shares = _shares(found, truth)
            curve.append(Point(effort=effort, recall=shares, milliseconds=milliseconds))
            if min(shares.values(), default=1.0) >= _ENOUGH:
                break
        now = [point.recall for point in curve[-len(efforts) :]]
        if now == before or _worst(curve[-1]) >= _ENOUGH:
            break  # further probes look into nothing new, or there is nothing more to find
        before = now
    enough = [point for point in curve if _surely(point, truth) >= target]
    return Measurement(
        items=store.count(),
        target=target,
        queries={kind: len(rows) for kind, rows in queries.items()},
        curve=tuple(curve),
        chosen=min(enough, key=lambda point: point.milliseconds),
        measured_at=time.time(),
    )


def written(measurement: Measurement) -> str:
    """A measurement as the note that is kept beside its collection."""
    return json.dumps(asdict(measurement), indent=1)


def read_measurement(note: str | None) -> Measurement | None:
    """What was measured last; None if nothing was, or it cannot be read."""
    if note is None:
        return None
    try:
        tree = json.loads(note)
        return Measurement(
            **{
                **tree,
                "curve": tuple(_read_point(each) for each in tree["curve"]),
                "chosen": _read_point(tree["chosen"]),
            }
        )
    except (ValueError, KeyError, TypeError):
        _log.warning("the recall measured last cannot be read; it is measured again")
        return None


def _read_point(tree: dict[str, object]) -> Point:
    effort = tree["effort"]
    known = Effort(**effort) if isinstance(effort, dict) else None
    return Point(**{**tree, "effort": known})  # type: ignore[arg-type] # JSON of asdict's making


def _searched(
    store: Store, queries: Mapping[QueryKind, np.ndarray], effort: Effort | None
) -> tuple[Found, float]:
    """The ids that each query finds, and the median of the milliseconds."""
    found: Found = {}
    times: list[float] = []
    for kind, rows in queries.items():
        found[kind] = []
        for row in rows:
            start = time.perf_counter()
            found[kind].append({hit.id for hit in store.search(row, _LIMIT, effort=effort)})
            times.append(1000 * (time.perf_counter() - start))
    return found, round(float(np.median(times)), 3) if times else 0.0


def _shares(found: Found, truth: Found) -> dict[QueryKind, float]:
    return {
        kind: sum(len(ids & exact) for ids, exact in zip(found[kind], truth[kind], strict=True))
        / max(1, sum(map(len, truth[kind])))
        for kind in truth
    }


def _surely(point: Point, truth: Found) -> float:
    """The worst recall less its standard error: of other queries, most will reach it too."""
    least = 1.0
    for kind, share in point.recall.items():
        answers = max(1, sum(map(len, truth[kind])))
        least = min(least, share - math.sqrt(share * (1 - share) / answers))
    return least


def _worst(point: Point) -> float:
    return min(point.recall.values(), default=1.0)
