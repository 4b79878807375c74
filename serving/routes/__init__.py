"""The wire: one resource a file."""

from serving.routes import (
    caption,
    classify,
    collections,
    embeddings,
    health,
    items,
    kserve,
    label_sets,
    maps,
    metrics,
    models,
    pages,
    search,
    similarity,
)

__all__ = ["routers"]

routers = (
    classify.router,
    caption.router,
    label_sets.router,
    embeddings.router,
    similarity.router,
    search.router,
    items.router,
    collections.router,
    maps.router,
    kserve.inference_router,
    kserve.router,
    models.router,
    health.router,
    metrics.router,
    pages.router,
)
