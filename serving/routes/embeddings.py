"""`POST /v1/embeddings`, as OpenAI's clients speak it."""

import base64

from fastapi import APIRouter

from serving.routes.state import ServicesDep, refuse_more_than
from serving.schemas import EmbeddingOut, EmbeddingsRequest, EmbeddingsResponse, Usage
from serving.services.embedding import embed_mixed

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["embeddings"])


@router.post("/embeddings")
async def embed(body: EmbeddingsRequest, services: ServicesDep) -> EmbeddingsResponse:
    """Unit vectors of texts and images (data URLs), in one space and comparable by cosine."""
    inputs = [body.input] if isinstance(body.input, str) else body.input
    refuse_more_than(services.settings.max_images, len(inputs), "inputs")
    texts = [len(text) for text in inputs if not text.startswith("data:image/")]
    refuse_more_than(services.settings.max_text_characters, max(texts, default=0), "characters")
    rows = await embed_mixed(services.embedder, inputs)
    as_base64 = body.encoding_format == "base64"
    data = [
        EmbeddingOut(
            index=number,
            embedding=base64.b64encode(row.tobytes()).decode() if as_base64 else row.tolist(),
        )
        for number, row in enumerate(rows)
    ]
    # Words stand in for tokens: nobody is billed, but clients expect the field.
    words = sum(len(text.split()) for text in inputs if not text.startswith("data:image/"))
    return EmbeddingsResponse(
        data=data,
        model=services.embedder.info.fingerprint,
        usage=Usage(prompt_tokens=words, total_tokens=words),
    )
