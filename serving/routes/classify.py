"""`POST /v1/classify`."""

from fastapi import APIRouter, Request

from serving.routes.bodies import body_schema, parse_body
from serving.routes.state import ServicesDep, refuse_more_than
from serving.schemas import ClassifyRequest, ClassifyResponse, ClassifyResult, PredictionOut
from serving.services.classification import classify

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["classification"])


@router.post("/classify", openapi_extra=body_schema(ClassifyRequest, ("images",)))
async def classify_images(request: Request, services: ServicesDep) -> ClassifyResponse:
    """Tell which of the given labels each image shows, without training on them."""
    body = await parse_body(request, ClassifyRequest, lists=("images", "labels", "templates"))
    settings, embedder = services.settings, services.embedder(body.model)
    refuse_more_than(settings.max_images, len(body.images), "images")
    refuse_more_than(settings.max_labels, len(body.labels) * len(body.templates), "prompts")
    longest = max(map(len, [*body.labels, *body.templates]))
    refuse_more_than(settings.max_text_characters, longest, "characters of a label or template")
    results = await classify(
        embedder,
        body.images,
        body.labels,
        templates=body.templates,
        mode=body.mode,
        top_k=body.top_k,
    )
    return ClassifyResponse(
        model=embedder.info.fingerprint,
        results=[
            ClassifyResult(predictions=[PredictionOut.model_validate(vars(p)) for p in predictions])
            for predictions in results
        ],
    )
