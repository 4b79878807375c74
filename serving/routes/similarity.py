"""`POST /v1/similarity`."""

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from serving.routes.bodies import body_schema, parse_body
from serving.routes.direct import DirectRoute
from serving.routes.state import ServicesDep, refuse_more_than
from serving.schemas import ModelName, Several, Text
from serving.services.embedding import is_image
from serving.together import together

__all__ = ["SimilarityRequest", "SimilarityResponse", "router"]

router = APIRouter(prefix="/v1", tags=["embeddings"], route_class=DirectRoute)


class SimilarityRequest(BaseModel):
    """Each entry is a text, or a data URL of an image."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    queries: Several[Text] = Field(min_length=1)
    candidates: Several[Text] = Field(min_length=1)
    model: ModelName = None


class SimilarityResponse(BaseModel):
    """Cosines are of unit vectors: -1 to 1."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str
    cosines: list[list[float]]
    """A row for each query, a column for each candidate."""
    logit_scale: float
    """The model's own multiplier of cosines before a softmax or sigmoid."""
    logit_bias: float | None


@router.post("/similarity", openapi_extra=body_schema(SimilarityRequest))
async def similarity(request: Request, services: ServicesDep) -> SimilarityResponse:
    """Cosines of every query with every candidate; each is a text or an image (data URL)."""
    body = await parse_body(request, SimilarityRequest)
    settings, embedder = services.settings, services.embedder(body.model)
    inputs = [*body.queries, *body.candidates]
    refuse_more_than(settings.max_images, len(inputs), "inputs")
    longest = max((len(text) for text in inputs if not is_image(text)), default=0)
    refuse_more_than(settings.max_text_characters, longest, "characters")
    queries, candidates = await together(
        embedder.mixed_rows(body.queries, field="queries"),
        embedder.mixed_rows(body.candidates, field="candidates"),
    )
    return SimilarityResponse(
        model=embedder.info.fingerprint,
        cosines=(queries @ candidates.T).tolist(),
        logit_scale=embedder.info.logit_scale,
        logit_bias=embedder.info.logit_bias,
    )
