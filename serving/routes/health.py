"""Probes, and what is being served."""

import logging

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from serving.routes.state import Services, ServicesDep
from serving.schemas import Health, ModelEntry, ModelOut, ModelsOut, RuntimeOut

__all__ = ["readiness", "router"]

router = APIRouter(tags=["operations"])
_log = logging.getLogger("serving")


@router.get("/healthz")
async def alive() -> Health:
    """The process answers."""
    return Health(status="alive")


@router.get("/readyz", responses={503: {"model": Health}})
async def ready(services: ServicesDep) -> JSONResponse:
    """The model computes and the collection answers: a worker with a broken model is not ready."""
    if not await readiness(services):
        return JSONResponse({"status": "the model or the collection does not answer"}, 503)
    return JSONResponse({"status": "ready"})


async def readiness(services: Services) -> bool:
    """Whether the model computes and the collection answers; the log has why not."""
    try:
        await services.embedder.check(seconds=services.settings.ready_seconds)
        await services.retriever.count()
    except Exception:  # noqa: BLE001 - whatever is broken, the answer is the same
        _log.exception("not ready")
        return False
    return True


@router.get("/v1/models")
async def models(services: ServicesDep) -> ModelsOut:
    """What is served, as OpenAI's clients list it, with the runtime and what was measured."""
    info = services.embedder.info
    runtimes = [
        RuntimeOut(
            name=figures.runtime,
            images_per_second=figures.images_per_second,
            texts_per_second=figures.texts_per_second,
            refused=figures.refused,
            **({} if figures.parity is None else figures.parity.model_dump()),
        )
        for figures in services.figures
    ]
    entry = ModelEntry(
        id=info.name,
        fingerprint=info.fingerprint,
        dim=info.dim,
        runtime=services.embedder.runtime,
        runtimes=runtimes,
    )
    return ModelsOut(data=[entry])


@router.get("/v1/model")
async def model(services: ServicesDep) -> ModelOut:
    """The bundle being served: fingerprint, metrics, provenance."""
    info = services.embedder.info
    return ModelOut(
        name=info.name,
        fingerprint=info.fingerprint,
        runtime=services.embedder.runtime,
        dim=info.dim,
        logit_scale=info.logit_scale,
        logit_bias=info.logit_bias,
        image_size=info.image.size,
        context_length=info.tokenizer.context_length,
        metrics=info.metrics,
        provenance=info.provenance,
    )
