"""`POST /v1/search`."""

import time

from fastapi import APIRouter, Request

from serving.routes.bodies import body_schema, parse_body
from serving.routes.items import thumbnail_path
from serving.routes.state import ServicesDep, refuse_more_than
from serving.schemas import HitOut, SearchRequest, SearchResponse

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["search"])


@router.post("/search", openapi_extra=body_schema(SearchRequest, ("image",)))
async def search(request: Request, services: ServicesDep) -> SearchResponse:
    """Find stored items by a text, by an image, or by another item; best first."""
    start = time.perf_counter()
    body = await parse_body(request, SearchRequest, objects=("filter",))
    settings = services.settings
    refuse_more_than(settings.max_text_characters, len(body.text or ""), "characters")
    retriever = await services.retriever(body.collection)
    hits = await retriever.search(
        text=body.text,
        image=body.image,
        item_id=body.id,
        limit=body.limit,
        where=body.model_dump(include={"filter"}, exclude_unset=True).get("filter", {}),
    )
    results = [
        HitOut(
            id=hit.id,
            score=hit.score,
            text=hit.text,
            metadata=hit.metadata,
            thumbnail=thumbnail_path(hit.id, body.collection) if hit.has_thumbnail else None,
        )
        for hit in hits
    ]
    items = await retriever.count()
    elapsed = round(1000 * (time.perf_counter() - start), 2)
    return SearchResponse(results=results, items=items, milliseconds=elapsed)
