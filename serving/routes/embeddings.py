"""`POST /v1/embeddings`, as OpenAI's clients speak it."""

import base64

from fastapi import APIRouter, Request

from serving.errors import BadInputError
from serving.routes.bodies import body_schema, parse_body
from serving.routes.state import ServicesDep, refuse_more_than
from serving.schemas import EmbeddingOut, EmbeddingsRequest, EmbeddingsResponse, Usage
from serving.services.embedding import is_image_url

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["embeddings"])


@router.post("/embeddings", openapi_extra=body_schema(EmbeddingsRequest))
async def embed(request: Request, services: ServicesDep) -> EmbeddingsResponse:
    """Unit vectors of texts and images (data URLs), in one space and comparable by cosine."""
    body = await parse_body(request, EmbeddingsRequest)
    embedder, settings = services.embedder(body.model), services.settings
    inputs = [body.input] if isinstance(body.input, str) else body.input
    texts = [text for text in inputs if not is_image_url(text)]
    refuse_more_than(settings.max_images, len(inputs), "inputs")
    refuse_more_than(settings.max_text_characters, max(map(len, texts), default=0), "characters")
    if body.dimensions not in (None, embedder.info.dim):
        message = f"dimensions: this model has {embedder.info.dim}, found {body.dimensions}"
        raise BadInputError(message)
    rows = await embedder.mixed_rows(inputs)
    as_base64 = body.encoding_format == "base64"
    data = [
        EmbeddingOut(
            index=number,
            embedding=base64.b64encode(row.astype("<f4").tobytes()).decode()
            if as_base64
            else row.tolist(),
        )
        for number, row in enumerate(rows)
    ]
    tokens = await embedder.count_tokens(texts)
    return EmbeddingsResponse(
        data=data,
        model=embedder.info.fingerprint,
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )
