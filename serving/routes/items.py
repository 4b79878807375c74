"""`/v1/items`: what can be found."""

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from pydantic import TypeAdapter, ValidationError

from serving.errors import BadInputError, NotFoundError
from serving.routes.bodies import body_schema, parse_body
from serving.routes.state import ServicesDep, refuse_more_than
from serving.schemas import (
    AddedItems,
    DeletedItems,
    DeleteRequest,
    FilterIn,
    ItemIn,
    ItemOut,
    ItemsPage,
    ItemsRequest,
    ListedItem,
)
from serving.services.retrieval import NewItem
from serving.wording import in_words

__all__ = ["CollectionName", "router", "thumbnail_path"]

router = APIRouter(prefix="/v1/items", tags=["items"])
CollectionName = Annotated[
    str | None,
    Query(max_length=64, description="A name of `/v1/collections`; none: the default one."),
]
_FILTER: TypeAdapter[FilterIn] = TypeAdapter(FilterIn)
_ONE_OR_MANY = body_schema(ItemIn, ("image",))
_ONE_OR_MANY["requestBody"]["content"]["application/json"]["schema"] = {
    "$ref": "#/components/schemas/ItemsRequest"
}


@router.post("", status_code=201, openapi_extra=_ONE_OR_MANY)
async def add_items(
    request: Request, services: ServicesDep, collection: CollectionName = None
) -> AddedItems:
    """Store items, replacing those of the same id: a JSON list, or one upload.

    They are on disk and found by every search that starts after the answer.
    """
    if request.headers.get("content-type", "").startswith("multipart/"):
        items = [await parse_body(request, ItemIn, objects=("metadata",))]
    else:
        items = (await parse_body(request, ItemsRequest)).items
    refuse_more_than(services.settings.max_images, len(items), "items")
    longest = max(len(item.text or "") for item in items)
    refuse_more_than(services.settings.max_text_characters, longest, "characters")
    new = [NewItem(id=i.id, image=i.image, text=i.text, metadata=i.metadata) for i in items]
    retriever = await services.retriever(collection, to_write=True)
    return AddedItems(ids=await retriever.add(new))


@router.get("")
async def list_items(
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=256, description="`next` of the page before")] = "",
    filter: Annotated[str, Query(description="JSON, as in a search")] = "{}",
    vectors: Annotated[bool, Query(description="whether items bring their vectors")] = False,
    collection: CollectionName = None,
) -> ItemsPage:
    """Items in the order of their ids, page by page.

    What stays is seen exactly once, whatever is written meanwhile.
    """
    where = _filter_of(filter)
    retriever = await services.retriever(collection)
    items = await retriever.page(limit=limit, after=after, where=where)
    listed = [
        ListedItem(
            id=item.id,
            text=item.text,
            metadata=item.metadata,
            thumbnail=None if item.thumbnail is None else thumbnail_path(item.id, collection),
            modality=item.modality,
            vector=item.vector.tolist() if vectors else None,
        )
        for item in items
    ]
    last = items[-1].id if len(items) == limit else None
    return ItemsPage(items=listed, next=last, total=await retriever.count(where))


@router.post("/delete", openapi_extra=body_schema(DeleteRequest))
async def delete_items(
    request: Request, services: ServicesDep, collection: CollectionName = None
) -> DeletedItems:
    """Remove items by their ids, or all that fulfil a filter; those that are not there count 0."""
    body = await parse_body(request, DeleteRequest)
    retriever = await services.retriever(collection, to_write=True)
    if body.ids is not None:
        return DeletedItems(deleted=await retriever.delete_many(body.ids))
    where = body.model_dump(include={"filter"}, exclude_unset=True)["filter"]
    return DeletedItems(deleted=await retriever.delete_where(where))


@router.get("/{item_id:path}/thumbnail", response_class=Response)
async def thumbnail(
    item_id: str, services: ServicesDep, collection: CollectionName = None
) -> Response:
    """The small picture of an item, as WebP."""
    item = await (await services.retriever(collection)).get(item_id)
    if item.thumbnail is None:
        message = f"item {item_id!r} has no picture"
        raise NotFoundError(message)
    headers = {"cache-control": "private, max-age=3600"}
    return Response(item.thumbnail, media_type="image/webp", headers=headers)


@router.get("/{item_id:path}")
async def get_item(
    item_id: str, services: ServicesDep, collection: CollectionName = None
) -> ItemOut:
    """One item."""
    item = await (await services.retriever(collection)).get(item_id)
    return ItemOut(
        id=item.id,
        text=item.text,
        metadata=item.metadata,
        thumbnail=None if item.thumbnail is None else thumbnail_path(item.id, collection),
    )


@router.delete("/{item_id:path}", status_code=204)
async def delete_item(
    item_id: str, services: ServicesDep, collection: CollectionName = None
) -> None:
    """Remove one item."""
    await (await services.retriever(collection, to_write=True)).delete(item_id)


def _filter_of(text: str) -> dict[str, Any]:
    try:
        return _FILTER.dump_python(_FILTER.validate_json(text), exclude_unset=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        message = in_words([{**first, "loc": ("query", "filter", *first["loc"])}])
        raise BadInputError(message) from error


def thumbnail_path(item_id: str, collection: str | None = None) -> str:
    """Where the picture of an item is found."""
    path = f"/v1/items/{quote(item_id, safe='')}/thumbnail"
    return path if collection is None else f"{path}?collection={quote(collection, safe='')}"
