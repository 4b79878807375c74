"""`/v1/models`: what is served, and changing it while it is served."""

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from serving.routes.bodies import body_schema, parse_optional_body
from serving.routes.state import Services, ServicesDep
from serving.services.registry import ServedModel

__all__ = ["LoadRequest", "router"]

router = APIRouter(prefix="/v1", tags=["models"])


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ModelOut(_Schema):
    """The default model."""

    name: str
    fingerprint: str
    runtime: str
    dim: int
    logit_scale: float
    logit_bias: float | None
    image_size: int
    context_length: int
    metrics: dict[str, Any]
    provenance: dict[str, Any]


class RuntimeOut(_Schema):
    """One way to compute the model, as measured on this machine against torch in fp32."""

    name: str
    image_cosine: float | None = None
    text_cosine: float | None = None
    top1_agreement: float | None = None
    num_pairs: int | None = None
    calibration: str | None = None
    images_per_second: float | None
    texts_per_second: float | None
    refused: str | None
    """Why it may not answer."""


class ModelEntry(_Schema):
    """A model that answers under the name `id`."""

    id: str
    """Its fingerprint, where it lost its name to another and is kept for `collections`."""
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "vlm"
    bundle: str
    """What the bundle calls itself."""
    fingerprint: str
    kind: str
    """`dual_encoder`, or `coca`, which also writes captions."""
    dim: int
    runtime: str
    """What computes."""
    device: str
    """Where, in the process that answered."""
    runtimes: list[RuntimeOut]
    """What was considered, the fastest first; none where torch in fp32 was asked for."""
    collections: list[str]
    """Open collections that hold its vectors."""
    metrics: dict[str, Any]
    """The evaluation it left training with."""
    provenance: dict[str, Any]
    """How it was trained."""


class ModelsOut(_Schema):
    """As OpenAI's clients list models; the default one comes first."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
    available: list[str]
    """Bundles that can be loaded."""


class LoadRequest(_Schema):
    """Which bundle of the server's folder the name shall stand for."""

    bundle: str | None = Field(default=None, min_length=1, max_length=128)
    """Its folder's name; left out: the same as the model's name."""


@router.get("/models")
async def models(services: ServicesDep) -> ModelsOut:
    """What is served, with provenance, metrics, runtime, and what was measured of it."""
    registry = services.registry
    return ModelsOut(
        data=[_entry(model, services) for model in registry.served()],
        available=await registry.available(),
    )


@router.get("/models/{name}")
async def one_model(name: str, services: ServicesDep) -> ModelEntry:
    """A model by its name or fingerprint."""
    return _entry(services.registry.get(name), services)


@router.get("/model")
async def model(services: ServicesDep) -> ModelOut:
    """The default model: fingerprint, metrics, provenance."""
    embedder = services.embedder()
    info = embedder.info
    return ModelOut(
        name=info.name,
        fingerprint=info.fingerprint,
        runtime=embedder.runtime,
        dim=info.dim,
        logit_scale=info.logit_scale,
        logit_bias=info.logit_bias,
        image_size=info.image.size,
        context_length=info.tokenizer.context_length,
        metrics=info.metrics,
        provenance=info.provenance,
    )


@router.post(
    "/models/{name}/load",
    openapi_extra=body_schema(LoadRequest, required=False),
)
async def load(name: str, request: Request, services: ServicesDep) -> ModelEntry:
    """Serve a bundle under a name; it is verified and run before it takes the old one's place.

    Requests that have begun end with the model they began with.
    """
    body = await parse_optional_body(request, LoadRequest)
    return _entry(await services.load(name, body.bundle), services)


@router.post("/models/{name}/unload", status_code=204)
async def unload(name: str, services: ServicesDep) -> None:
    """Answer no more under a name; requests that have begun are finished.

    A model that open collections need is kept for them under its fingerprint; unloaded by that, it
    is gone, and they answer 409 until it is loaded again.
    """
    await services.unload(name)


def _entry(model: ServedModel, services: Services) -> ModelEntry:
    info = model.info
    runtimes = [
        RuntimeOut(
            name=figures.runtime,
            images_per_second=figures.images_per_second,
            texts_per_second=figures.texts_per_second,
            refused=figures.refused,
            **({} if figures.parity is None else figures.parity.model_dump()),
        )
        for figures in model.figures
    ]
    return ModelEntry(
        id=model.name,
        bundle=info.name,
        fingerprint=info.fingerprint,
        kind=info.model_kind,
        dim=info.dim,
        runtime=model.embedder.runtime,
        device=services.settings.device,
        runtimes=runtimes,
        collections=services.collections.of_model(info.fingerprint),
        metrics=info.metrics,
        provenance=info.provenance,
    )
