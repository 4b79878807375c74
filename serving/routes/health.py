"""Probes."""

import logging
from collections.abc import Awaitable

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from serving.routes.state import Services, ServicesDep
from serving.schemas import Health

__all__ = ["answers", "readiness", "router"]

router = APIRouter(tags=["operations"])
_log = logging.getLogger("serving")


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def alive() -> Health:
    """The process answers."""
    return Health(status="alive")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses={503: {"model": Health}})
async def ready(services: ServicesDep) -> JSONResponse:
    """Models compute and the collection answers: a worker with a broken model is not ready."""
    if not await readiness(services):
        return JSONResponse({"status": "the model or the collection does not answer"}, 503)
    return JSONResponse({"status": "ready"})


async def readiness(services: Services) -> bool:
    """Whether every model computes and the collection answers; the log has why not."""
    checks = services.registry.check(seconds=services.settings.ready_seconds)
    return await answers(checks) and await answers(_searches(services))


async def answers(check: Awaitable[object]) -> bool:
    """Whether this returns at all; the log has why not."""
    try:
        await check
    except Exception:  # noqa: BLE001 - whatever is broken, the answer is the same
        _log.exception("not ready")
        return False
    return True


async def _searches(services: Services) -> None:
    await (await services.retriever()).check()
