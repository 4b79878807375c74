"""A map of a collection: some of its items, and what they are called, in two dimensions.

Pictures and captions lie in two places of the same sphere. Drawn as they are stored, the map shows
the gap between them; with the mean of each modality taken away, it shows what is near to what.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from serving.services.embedding import Embedder
from serving.services.ranking import centred
from serving.stores import Item, Modality, Store

__all__ = ["CollectionMap", "MapPoint", "View", "draw_map", "principal_axes"]

_SMALL: Final = 1e-12


@dataclass(frozen=True, kw_only=True)
class MapPoint:
    """One vector of the map."""

    item: Item
    modality: Modality
    """`text` also for the caption of a picture, which is no item of its own."""


@dataclass(frozen=True, kw_only=True)
class View:
    """All points in one geometry."""

    places: np.ndarray
    """The first two principal axes, float64 [point 2]; their unit is that of the cosines."""
    explained_fraction: float
    """Of the variance, what these two axes hold; 0 to 1."""
    gap: float | None
    """Distance between the means of pictures and of texts; None if one of them is missing."""


@dataclass(frozen=True, kw_only=True)
class CollectionMap:
    """The same points, as they are stored and centred."""

    points: Sequence[MapPoint]
    raw: View
    centred: View | None
    """None: the bundle has no modality means."""


async def draw_map(store: Store, embedder: Embedder, count: int) -> CollectionMap:
    """A map of items that are drawn evenly, always the same ones; captions are embedded.

    Args:
        store: The collection.
        embedder: Of the model that made its vectors.
        count: Most items; each picture with a caption adds a second point.
    """
    items = await asyncio.to_thread(store.sample, count)
    captioned = [i for i in items if i.modality == "image" and (i.text or "").strip()]
    captions = await embedder.text_rows([item.text or "" for item in captioned])
    points = [
        *(MapPoint(item=item, modality=item.modality) for item in items),
        *(MapPoint(item=item, modality="text") for item in captioned),
    ]
    if not points:
        nothing = View(places=np.empty((0, 2)), explained_fraction=0.0, gap=None)
        return CollectionMap(points=[], raw=nothing, centred=None)
    rows = np.stack([*(item.vector for item in items), *captions]).astype(np.float64)
    return await asyncio.to_thread(_drawn, points, rows, embedder)


def principal_axes(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Rows on their first two principal axes, and the fraction of their variance there.

    Which way an axis points is no property of the rows: here the largest part of it is positive,
    so that equal rows are drawn equally.

    Args:
        rows: float64 [row dim], at least one.

    Returns:
        [row 2] and 0 to 1.
    """
    moved = rows - rows.mean(axis=0)
    _, sizes, axes = np.linalg.svd(moved, full_matrices=False)
    axes = axes[:2]
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.sign(axes[np.arange(len(axes)), largest])[:, None]
    places = np.zeros((len(rows), 2))
    places[:, : len(axes)] = moved @ axes.T
    total = float(np.square(sizes).sum())
    held = float(np.square(sizes[:2]).sum())
    return places, held / total if total > _SMALL else 0.0


def _drawn(points: Sequence[MapPoint], rows: np.ndarray, embedder: Embedder) -> CollectionMap:
    is_text = np.array([point.modality == "text" for point in points])
    means = embedder.info.modality_means
    moved = None
    if means is not None:
        moved = rows.copy()
        for chosen, mean in ((~is_text, means.image), (is_text, means.text)):
            moved[chosen] = centred(rows[chosen], np.asarray(mean))
    return CollectionMap(
        points=points,
        raw=_view(rows, is_text),
        centred=None if moved is None else _view(moved, is_text),
    )


def _view(rows: np.ndarray, is_text: np.ndarray) -> View:
    places, explained = principal_axes(rows)
    gap = None
    if is_text.any() and not is_text.all():
        gap = float(np.linalg.norm(rows[~is_text].mean(axis=0) - rows[is_text].mean(axis=0)))
    return View(places=places, explained_fraction=explained, gap=gap)
