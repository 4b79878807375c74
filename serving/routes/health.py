"""Probes, and what is being served."""

import logging

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from serving.routes.state import ServicesDep
from serving.schemas import Health, ModelOut

__all__ = ["router"]

router = APIRouter(tags=["operations"])
_log = logging.getLogger("serving")


@router.get("/healthz")
async def alive() -> Health:
    """The process answers."""
    return Health(status="alive")


@router.get("/readyz", responses={503: {"model": Health}})
async def ready(services: ServicesDep) -> JSONResponse:
    """The model computes and the collection answers: a worker with a broken model is not ready."""
    try:
        await services.embedder.check(seconds=services.settings.ready_seconds)
        await services.retriever.count()
    except Exception:  # noqa: BLE001 - whatever is broken, the answer is the same; the log has it
        _log.exception("not ready")
        return JSONResponse({"status": "the model or the collection does not answer"}, 503)
    return JSONResponse({"status": "ready"})


@router.get("/v1/model")
async def model(services: ServicesDep) -> ModelOut:
    """The bundle being served: fingerprint, metrics, provenance."""
    info = services.embedder.info
    return ModelOut(
        name=info.name,
        fingerprint=info.fingerprint,
        dim=info.dim,
        logit_scale=info.logit_scale,
        logit_bias=info.logit_bias,
        image_size=info.image.size,
        context_length=info.tokenizer.context_length,
        metrics=info.metrics,
        provenance=info.provenance,
    )
