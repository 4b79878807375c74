"""`GET /metrics`, for Prometheus."""

from fastapi import APIRouter
from fastapi.responses import Response

from serving.metrics import METRICS_TYPE
from serving.routes.state import ServicesDep

__all__ = ["router"]

router = APIRouter(tags=["operations"])


@router.get("/metrics", response_class=Response)
async def metrics(services: ServicesDep) -> Response:
    """Latencies by route and stage, queues, batch sizes, refusals, memory, and the model."""
    return Response(services.metrics.exposition(), media_type=METRICS_TYPE)
