"""`/v2`: KServe's open inference protocol, as Triton's HTTP clients speak it.

One model with two optional inputs, `image` (image files) and `text`, and an output for each.
"""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

import vlm
from serving.errors import BadInputError
from serving.routes.bodies import body_schema, where_it_pays
from serving.routes.direct import DirectRoute
from serving.routes.health import answers, readiness
from serving.routes.state import ServicesDep, refuse_more_than
from serving.routes.tensors import (
    HEADER_LENGTH,
    InferRequest,
    Matrix,
    ServerOut,
    TensorMetadata,
    TensorModelOut,
    Tensors,
    answer_body,
    parse_tensors,
)
from serving.services.embedding import Embedder
from serving.settings import ServingSettings
from serving.together import together

__all__ = ["inference_router", "router"]

router = APIRouter(prefix="/v2", tags=["open inference protocol"])
inference_router = APIRouter(
    prefix="/v2", tags=["open inference protocol"], route_class=DirectRoute
)
_OUTPUTS = {"image": "image_embedding", "text": "text_embedding"}


@router.get("")
async def server() -> ServerOut:
    """Name, version and extensions of the server."""
    return ServerOut(name="vlm", version=vlm.__version__, extensions=["binary_tensor_data"])


@router.get("/health/live")
async def live() -> JSONResponse:
    """The process answers."""
    return JSONResponse({"live": True})


@router.get("/health/ready")
async def ready(services: ServicesDep) -> JSONResponse:
    """The model computes."""
    is_ready = await readiness(services)
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


@router.get("/models/{name}")
async def model(name: str, services: ServicesDep) -> TensorModelOut:
    """Inputs and outputs of a model."""
    embedder = services.embedder(name)
    info = embedder.info
    return TensorModelOut(
        name=name,
        versions=[info.fingerprint[:12]],
        platform=f"vlm_{embedder.runtime}",
        inputs=[TensorMetadata(name=n, datatype="BYTES", shape=[-1]) for n in _OUTPUTS],
        outputs=[
            TensorMetadata(name=n, datatype="FP32", shape=[-1, info.dim]) for n in _OUTPUTS.values()
        ],
    )


@router.get("/models/{name}/ready")
async def model_ready(name: str, services: ServicesDep) -> JSONResponse:
    """The model of that name computes."""
    model = services.registry.get(name)
    is_ready = await answers(model.embedder.check(seconds=services.settings.ready_seconds))
    return JSONResponse({"name": name, "ready": is_ready}, 200 if is_ready else 503)


@inference_router.post(
    "/models/{name}/infer", response_class=Response, openapi_extra=body_schema(InferRequest)
)
async def infer(name: str, request: Request, services: ServicesDep) -> Response:
    """Unit vectors of image files and of texts, in JSON or as raw tensors."""
    embedder = services.embedder(name)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "compressed bodies are not understood; send them as they are")
    body, header = await request.body(), request.headers.get(HEADER_LENGTH)
    tensors = await where_it_pays(len(body), parse_tensors, body, header, known=tuple(_OUTPUTS))
    outputs = _wanted(tensors, await _embedded(tensors, embedder, services.settings))
    info = embedder.info
    head = {"model_name": name, "model_version": info.fingerprint[:12]}
    if tensors.request.id is not None:
        head["id"] = tensors.request.id
    size = sum(rows.nbytes for rows in outputs.values())
    content, length = await where_it_pays(size, answer_body, head, outputs, tensors)
    if length is None:
        return Response(content, media_type="application/json")
    return Response(
        content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(length)}
    )


async def _embedded(
    tensors: Tensors, embedder: Embedder, settings: ServingSettings
) -> dict[str, Matrix]:
    """Rows by output, of the inputs that were given."""
    images, files = tensors.elements.get("image"), tensors.elements.get("image", [])
    texts, words = tensors.elements.get("text"), _decoded(tensors.elements.get("text", []))
    refuse_more_than(settings.max_images, len(files) + len(words), "images and texts")
    refuse_more_than(settings.max_text_characters, max(map(len, words), default=0), "characters")
    pictures = await embedder.prepare({f"image.{n}": file for n, file in enumerate(files)})
    image_rows, text_rows = await together(embedder.image_rows(pictures), embedder.text_rows(words))
    rows: dict[str, Matrix] = {}
    if images is not None:
        rows["image_embedding"] = image_rows
    if texts is not None:
        rows["text_embedding"] = text_rows
    return rows


def _wanted(tensors: Tensors, rows: dict[str, Matrix]) -> dict[str, Matrix]:
    if tensors.request.outputs is None:
        return rows
    names = [output.name for output in tensors.request.outputs]
    for name in names:
        if name not in rows:
            message = f"output {name[:64]!r}: the inputs given lead to {', '.join(rows)}"
            raise BadInputError(message)
    return {name: rows[name] for name in names}


def _decoded(elements: list[bytes]) -> list[str]:
    try:
        return [element.decode() for element in elements]
    except UnicodeDecodeError as error:
        message = f"text: not UTF-8 ({error.reason})"
        raise BadInputError(message) from error
