"""`POST /v1/search`."""

import time

from fastapi import APIRouter, Request

from serving.errors import BadInputError, ConflictError
from serving.routes.bodies import body_schema, parse_body
from serving.routes.direct import DirectRoute
from serving.routes.items import thumbnail_path
from serving.routes.state import Services, ServicesDep, refuse_more_than
from serving.schemas import HitOut, PartIn, SearchRequest, SearchResponse
from serving.services.ranking import Ranked
from serving.services.searching import Part, Question
from serving.stores import parse_filter

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["search"], route_class=DirectRoute)


@router.post("/search", openapi_extra=body_schema(SearchRequest, ("image",)))
async def search(request: Request, services: ServicesDep) -> SearchResponse:
    """Find stored items by texts, by images, by other items, or by sums of them; best first."""
    start = time.perf_counter()
    body = await parse_body(request, SearchRequest, objects=("filter", "parts"))
    question = _question(services, body)
    collection = await services.collections.get(body.collection)
    if body.model is not None:
        _check_model(services, body.model, collection.name, collection.store.fingerprint)
    answer = await collection.retriever.search(question)
    results = [_hit(ranked, body.collection) for ranked in answer.hits]
    items = await collection.retriever.count()
    elapsed = round(1000 * (time.perf_counter() - start), 2)
    return SearchResponse(
        results=results,
        items=items,
        centred=answer.centred,
        next=answer.next,
        milliseconds=elapsed,
    )


def _question(services: Services, body: SearchRequest) -> Question:
    if sum(given is not None for given in (body.text, body.image, body.id, body.parts)) != 1:
        message = "give exactly one of text, image and id, or parts"
        raise BadInputError(message)
    if body.parts is None:
        texts = [] if body.text is None else [body.text]
        parts = [Part(texts=texts, image=body.image, item_id=body.id, field="image")]
    else:
        parts = [_part(number, part) for number, part in enumerate(body.parts)]
        if body.model is None and any(part.vector is not None for part in body.parts):
            message = "model: name the model that made the vectors, to be compared with no other's"
            raise BadInputError(message)
    refuse_more_than(services.settings.max_images, sum(len(p.texts) or 1 for p in parts), "parts")
    longest = max((len(t) for p in parts for t in [*p.texts, body.words or ""]), default=0)
    refuse_more_than(services.settings.max_text_characters, longest, "characters")
    where = body.model_dump(include={"filter"}, exclude_unset=True).get("filter", {})
    return Question(
        parts=parts,
        limit=body.limit,
        where=parse_filter(where),
        geometry=body.geometry,
        words=body.words,
        diversity=body.diversity,
        group=body.group,
        reduce_hubs=body.reduce_hubs,
        calibrate=body.calibrate,
        after=body.after,
    )


def _part(number: int, part: PartIn) -> Part:
    texts = part.texts or ([] if part.text is None else [part.text])
    field = f"parts.{number}.{'image' if part.image is not None else 'vector'}"
    return Part(
        texts=texts,
        image=part.image,
        item_id=part.id,
        vector=part.vector,
        modality=part.modality,
        weight=part.weight,
        field=field,
    )


def _check_model(services: Services, asked: str, collection: str, fingerprint: str) -> None:
    """Vectors of different models are never compared."""
    found = services.embedder(asked).info
    if found.fingerprint != fingerprint:
        message = (
            f"collection {collection!r} holds vectors of model {fingerprint[:12]}, and "
            f"{asked[:64]!r} is {found.fingerprint[:12]}; similarities between models mean nothing"
        )
        raise ConflictError(message)


def _hit(ranked: Ranked, collection: str | None) -> HitOut:
    hit = ranked.hit
    return HitOut(
        id=hit.id,
        score=hit.score,
        text=hit.text,
        metadata=hit.metadata,
        thumbnail=thumbnail_path(hit.id, collection) if hit.has_thumbnail else None,
        modality=hit.modality,
        calibrated=ranked.calibrated,
        duplicates=list(ranked.duplicates),
    )
