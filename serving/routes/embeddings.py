"""`POST /v1/embeddings`, as OpenAI's clients speak it."""

import base64
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serving.errors import BadInputError
from serving.routes.bodies import body_schema, parse_body
from serving.routes.direct import DirectRoute
from serving.routes.state import ServicesDep, refuse_more_than
from serving.schemas import ModelName, Several, Text
from serving.services.embedding import is_image
from serving.services.fetching import RemoteImage

__all__ = ["EmbeddingsRequest", "router"]

router = APIRouter(prefix="/v1", tags=["embeddings"], route_class=DirectRoute)


class TextPart(BaseModel):
    """As in OpenAI's chats."""

    type: Literal["text"]
    text: Text


class ImageAddress(BaseModel):
    """Of an image: a data URL, or where the server allows it, http or https."""

    url: Annotated[str, Field(pattern="(?i)^(data:image/|https?://)")]


class ImagePart(BaseModel):
    """As in OpenAI's chats."""

    type: Literal["image_url"]
    image_url: ImageAddress


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _not_token_ids(value: object) -> object:
    """What OpenAI's own models take besides texts: numbers of a tokenizer that is not this one."""
    inner = value[0] if isinstance(value, list) and value else None
    if isinstance(inner, int) or (isinstance(inner, list) and inner and isinstance(inner[0], int)):
        message = (
            "token ids are not understood, since each model has its own; send the texts "
            "(LangChain's OpenAIEmbeddings does with check_embedding_ctx_length=False)"
        )
        raise ValueError(message)
    return value


class EmbeddingsRequest(BaseModel):
    """As OpenAI's; strings that are data URLs of images are embedded as images.

    An input may also be a content part, `{"type": "image_url", "image_url": {"url": …}}`.
    """

    # Clients send fields that do not matter here.
    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    input: Annotated[
        Text | ContentPart | Annotated[Several[Text | ContentPart], Field(min_length=1)],
        BeforeValidator(_not_token_ids),
    ]
    model: ModelName = None
    encoding_format: Literal["float", "base64"] | None = None
    """None: float."""
    dimensions: int | None = None
    """The model's own number, or nothing."""

    def inputs(self) -> list[str | RemoteImage]:
        """Texts, data URLs and addresses of images, in order."""
        entries = self.input if isinstance(self.input, list) else [self.input]
        return [_plain_input(entry) for entry in entries]


def _plain_input(entry: str | TextPart | ImagePart) -> str | RemoteImage:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, TextPart):
        return entry.text
    url = entry.image_url.url
    return url if url.lower().startswith("data:") else RemoteImage(url)


class EmbeddingOut(BaseModel):
    """One unit vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """What was read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """As OpenAI's."""

    object: Literal["list"] = "list"
    data: list[EmbeddingOut]
    model: str
    usage: Usage


@router.post(
    "/embeddings",
    openapi_extra=body_schema(EmbeddingsRequest),
    response_model=EmbeddingsResponse,
)
async def embed(request: Request, services: ServicesDep) -> Response:
    """Unit vectors of texts and images (data URLs), in one space and comparable by cosine."""
    body = await parse_body(request, EmbeddingsRequest)
    embedder, settings = services.embedder(body.model), services.settings
    inputs = body.inputs()
    texts = [text for text in inputs if isinstance(text, str) and not is_image(text)]
    refuse_more_than(settings.max_images, len(inputs), "inputs")
    refuse_more_than(settings.max_text_characters, max(map(len, texts), default=0), "characters")
    if body.dimensions not in (None, embedder.info.dim):
        message = f"dimensions: this model has {embedder.info.dim}, found {body.dimensions}"
        raise BadInputError(message)
    token_ids = await embedder.token_ids(texts)
    rows = await embedder.mixed_rows(inputs, token_ids=token_ids)
    as_base64 = body.encoding_format == "base64"
    tokens = sum(map(len, token_ids))
    # Made here, not by the schema: thousands of numbers that are known to be numbers.
    answer = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": number,
                "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode()
                if as_base64
                else row,
            }
            for number, row in enumerate(rows)
        ],
        "model": embedder.info.fingerprint,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    content = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, media_type="application/json")
