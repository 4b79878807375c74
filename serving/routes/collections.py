"""`/v1/collections`: what can be searched, how well, and under which names."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from serving.errors import ConflictError, NotFoundError
from serving.routes.bodies import body_schema, parse_body, parse_optional_body
from serving.routes.state import ServicesDep
from serving.schemas import ModelName
from serving.services.collections import Collection
from serving.services.recall import Measurement, Point, QueryKind
from serving.stores import IsModality

__all__ = ["router"]

router = APIRouter(prefix="/v1/collections", tags=["collections"])


class _Schema(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class CollectionsOut(_Schema):
    """Names."""

    collections: list[str]
    aliases: dict[str, str]
    """By alias the collection that it stands for."""


class PointOut(_Schema):
    """What one effort finds."""

    probes: int | None
    """Parts of the index that are looked into; null: exact search."""
    refine: int | None
    """Candidates for each hit that are compared exactly."""
    recall: dict[QueryKind, float]
    """Share of the 10 nearest items that is found, by kind of query."""
    milliseconds: float
    """Median of one search."""


class MeasurementOut(_Schema):
    """The index against exact search."""

    items: int
    """Size of the collection then."""
    measured_at: float
    """Seconds since 1970."""
    target: float
    meets_target: bool
    queries: dict[QueryKind, int]
    chosen: PointOut
    """What searches do now."""
    curve: list[PointOut]


class CollectionOut(_Schema):
    """A collection, and how well it is searched."""

    name: str
    """Behind an alias, that of the collection it stands for."""
    fingerprint: str
    """Of the model that made its vectors."""
    model: str
    dim: int
    items: int
    images: int
    texts: int
    indexed: bool
    """Whether there is an index; without one every search is exact."""
    measurement: MeasurementOut | None
    """None: nothing was measured, since so small a collection is searched exactly."""


class NewCollection(_Schema):
    """For which model."""

    model: ModelName = None


class AliasIn(_Schema):
    """What a name stands for."""

    collection: str = Field(max_length=64)
    """Its own name takes an alias away again."""


@router.get("")
async def list_collections(services: ServicesDep) -> CollectionsOut:
    """All collections and aliases."""
    collections = services.collections
    return CollectionsOut(
        collections=await collections.names(), aliases=await collections.aliases()
    )


@router.get("/{name}")
async def get_collection(name: str, services: ServicesDep) -> CollectionOut:
    """Size, model and measured recall of a collection."""
    return await _described(await services.collections.get(name))


@router.put("/{name}", openapi_extra=body_schema(NewCollection, required=False))
async def create_collection(name: str, request: Request, services: ServicesDep) -> CollectionOut:
    """Make an empty collection; the one there is stays as it is."""
    body = await parse_optional_body(request, NewCollection)
    collection = await services.collections.create(name, body.model)
    try:
        return await _described(collection)
    except NotFoundError as error:
        message = f"collection {name!r} was removed while it was made; make it again"
        raise ConflictError(message) from error


@router.delete("/{name}", status_code=204)
async def drop_collection(name: str, services: ServicesDep) -> None:
    """Remove a collection with all its items."""
    await services.collections.drop(name)


@router.post("/{name}/measure")
async def measure_collection(name: str, services: ServicesDep) -> CollectionOut:
    """Build the index anew where it is needed, and measure its recall now."""
    collection = await services.collections.get(name)
    await services.collections.measure(collection)
    return await _described(collection)


@router.put("/{name}/alias", openapi_extra=body_schema(AliasIn))
async def point_alias(name: str, request: Request, services: ServicesDep) -> CollectionsOut:
    """Make a name stand for a collection, from the next request on."""
    body = await parse_body(request, AliasIn)
    await services.collections.point(name, body.collection)
    return await list_collections(services)


@router.delete("/{name}/alias")
async def remove_alias(name: str, services: ServicesDep) -> CollectionsOut:
    """Let a name stand for nothing any more; the collection stays."""
    await services.collections.unpoint(name)
    return await list_collections(services)


async def _described(collection: Collection) -> CollectionOut:
    store, info = collection.store, collection.embedder.info
    items, texts, indexed = await asyncio.to_thread(
        lambda: (store.count(), store.count((IsModality("text"),)), store.is_indexed)
    )
    found = collection.measurement
    return CollectionOut(
        name=collection.name,
        fingerprint=info.fingerprint,
        model=info.name,
        dim=info.dim,
        items=items,
        images=items - texts,
        texts=texts,
        indexed=indexed,
        measurement=None if found is None else _measurement(found),
    )


def _measurement(found: Measurement) -> MeasurementOut:
    return MeasurementOut(
        items=found.items,
        measured_at=found.measured_at,
        target=found.target,
        meets_target=found.meets_target,
        queries=found.queries,
        chosen=_point(found.chosen),
        curve=[_point(point) for point in found.curve],
    )


def _point(point: Point) -> PointOut:
    effort: dict[str, Any] = {"probes": None, "refine": None}
    if point.effort is not None:
        effort = {"probes": point.effort.probes, "refine": point.effort.refine}
    return PointOut(**effort, recall=point.recall, milliseconds=point.milliseconds)
