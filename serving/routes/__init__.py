"""The wire: one resource a file."""

from serving.routes import classify, embeddings, health, items, pages, search

__all__ = ["routers"]

routers = (
    classify.router,
    embeddings.router,
    search.router,
    items.router,
    health.router,
    pages.router,
)
