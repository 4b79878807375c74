"""`GET /v1/collections/NAME/map`: where its pictures and their captions lie, in two dimensions."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict

from serving.routes.items import thumbnail_path
from serving.routes.state import ServicesDep
from serving.services.mapping import CollectionMap, View, draw_map

__all__ = ["router"]

router = APIRouter(prefix="/v1/collections", tags=["collections"])


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class PointOnMap(_Schema):
    """A picture, a text, or the caption of a picture."""

    id: str
    """Of the item; a picture and its caption share it."""
    modality: Literal["image", "text"]
    text: str | None
    thumbnail: str | None
    raw: tuple[float, float]
    """Its place as stored."""
    centred: tuple[float, float] | None
    """Its place when the mean of its modality is taken away; null: the model has no means."""


class ViewOut(_Schema):
    """What one way to draw the points shows."""

    explained_fraction: float
    """Of the variance, what the two axes hold; 0 to 1."""
    gap: float | None
    """Distance between the means of pictures and of texts; null: one of them is missing."""


class MapOut(_Schema):
    """A sample of a collection on its first two principal axes."""

    points: list[PointOnMap]
    """Pictures and texts of the collection, then the captions of those pictures."""
    items: int
    """Size of the whole collection."""
    raw: ViewOut
    centred: ViewOut | None


@router.get("/{name}/map")
async def map_collection(
    name: str, services: ServicesDep, sample: Annotated[int, Query(ge=2, le=500)] = 200
) -> MapOut:
    """Draw some items of a collection and their captions on their two principal axes.

    The same collection gives the same map. Captions are embedded for it, so it costs up to
    `sample` texts.
    """
    collection = await services.collections.get(name)
    found = await draw_map(collection.store, collection.embedder, sample)
    return MapOut(
        points=_points(found, None if name == "default" else name),
        items=await collection.retriever.count(),
        raw=_view(found.raw),
        centred=None if found.centred is None else _view(found.centred),
    )


def _points(found: CollectionMap, name: str | None) -> list[PointOnMap]:
    raw = found.raw.places.tolist()
    moved = [None] * len(raw) if found.centred is None else found.centred.places.tolist()
    return [
        PointOnMap(
            id=point.item.id,
            modality=point.modality,
            text=point.item.text,
            thumbnail=None if point.item.thumbnail is None else thumbnail_path(point.item.id, name),
            raw=_rounded(stored),
            centred=None if centred is None else _rounded(centred),
        )
        for point, stored, centred in zip(found.points, raw, moved, strict=True)
    ]


def _rounded(place: list[float]) -> tuple[float, float]:
    """To what can be seen; a last bit that a library turns must not change the answer."""
    return round(place[0], 4), round(place[1], 4)


def _view(view: View) -> ViewOut:
    gap = None if view.gap is None else round(view.gap, 4)
    return ViewOut(explained_fraction=round(view.explained_fraction, 4), gap=gap)
