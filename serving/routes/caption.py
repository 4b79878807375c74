"""`POST /v1/caption`."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from serving.errors import BadInputError
from serving.routes.bodies import body_schema, parse_body
from serving.routes.direct import DirectRoute
from serving.routes.state import ServicesDep, refuse_more_than
from serving.schemas import ImageSource, ModelName, Several

__all__ = ["CaptionRequest", "router"]

router = APIRouter(prefix="/v1", tags=["captions"], route_class=DirectRoute)


class CaptionRequest(BaseModel):
    """Images, and how tokens are chosen."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    images: Several[ImageSource] = Field(min_length=1)
    search: Literal["greedy", "beam", "nucleus", "contrastive"] = "beam"
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of `nucleus`, which draws."""
    model: ModelName = None


class CaptionResponse(BaseModel):
    """A caption for each image, in order."""

    model: str
    captions: list[str]


@router.post("/caption", openapi_extra=body_schema(CaptionRequest, ("images",)))
async def caption(request: Request, services: ServicesDep) -> CaptionResponse:
    """Write a caption for each image; only models of kind `coca` do."""
    body = await parse_body(request, CaptionRequest, lists=("images",))
    refuse_more_than(services.settings.max_images, len(body.images), "images")
    model = services.registry.get(body.model)
    if model.writer is None:
        message = f"model {model.name!r} writes no captions; a bundle of kind coca does"
        raise BadInputError(message)
    captions = await model.writer.captions(body.images, body.search, seed=body.seed)
    return CaptionResponse(model=model.info.fingerprint, captions=captions)
