"""The application: settings in, FastAPI out. Nothing happens before its lifespan starts."""

import asyncio
import http
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import vlm
from serving.errors import (
    BadInputError,
    ConflictError,
    NotFoundError,
    OverloadedError,
    StoreUnavailableError,
)
from serving.metrics import Metrics
from serving.routes import routers
from serving.routes.caption import CaptionRequest
from serving.routes.direct import DirectMiddleware
from serving.routes.embeddings import EmbeddingsRequest
from serving.routes.label_sets import CalibrateRequest, LabelSetRequest
from serving.routes.pages import static_mounts
from serving.routes.state import Services
from serving.routes.tensors import InferRequest
from serving.schemas import DeleteRequest, ItemsRequest, Problem, SearchRequest
from serving.security import GuardMiddleware, problem_response
from serving.services.collections import Collections
from serving.services.label_sets import LabelSets
from serving.services.registry import Registry
from serving.settings import ServingSettings
from serving.tracing import Tracing, otlp_provider
from serving.wording import in_words

__all__ = ["create_app"]

_log = logging.getLogger("serving")
_PROBLEMS = (400, 401, 403, 404, 405, 409, 413, 415, 421, 422, 429, 500, 503, 504)
_HIDDEN_SCHEMAS = (
    SearchRequest,
    Problem,
    ItemsRequest,
    InferRequest,
    CaptionRequest,
    EmbeddingsRequest,
    LabelSetRequest,
    CalibrateRequest,
    DeleteRequest,
)
_STATUS: dict[type[Exception], int] = {
    BadInputError: 422,
    ConflictError: 409,
    NotFoundError: 404,
    OverloadedError: 503,
}


def create_app(
    settings: ServingSettings,
    *,
    tracing: Tracing | None = None,
    settle: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The server of a default model, its collection, and further models.

    Args:
        settings: All that decides what is served, and how.
        tracing: Where spans go; by default where `settings.traces` says.
        settle: Called when all is loaded, and when a model that was replaced is no longer used.

    What it starts with is loaded, verified and run once before the server is ready.

    Raises (at start):
        BundleError: If the bundle cannot be loaded or trusted, or the runtime asked for strays.
        FingerprintError: If the index holds another model's vectors.
    """
    metrics = Metrics()
    if tracing is None and settings.traces is not None:
        tracing = Tracing(otlp_provider(settings.traces))
    app = FastAPI(
        title="vlm",
        version=vlm.__version__,
        description="Zero-shot classification, embeddings and cross-modal search.",
        lifespan=_lifespan(settings, metrics, tracing, settle),
        docs_url=None,
        redoc_url=None,
        responses={code: _described_problem(code) for code in _PROBLEMS},
    )
    for router in routers:
        app.include_router(router)
    for path, files in static_mounts().items():
        app.mount(path, files)
    handlers = {
        **dict.fromkeys(_STATUS, _serving_error),
        StoreUnavailableError: _store_error,
        RequestValidationError: _validation_error,
        HTTPException: _http_error,
    }
    for error_class, handler in handlers.items():
        app.add_exception_handler(error_class, handler)
    app.add_middleware(DirectMiddleware, routers=routers, handlers=handlers)
    app.add_middleware(GuardMiddleware, settings=settings, metrics=metrics, tracing=tracing)
    _describe_hidden_schemas(app)
    return app


def _lifespan(
    settings: ServingSettings,
    metrics: Metrics,
    tracing: Tracing | None,
    settle: Callable[[], None],
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        registry = Registry(settings, metrics)
        collections = Collections(settings, registry, metrics)
        try:
            await registry.start()
            model = registry.default
            # A collection stays with the model that made its vectors, whatever is loaded later.
            await collections.start()
            app.state.services = Services(
                settings=settings,
                registry=registry,
                collections=collections,
                label_sets=LabelSets(settings.label_sets_folder),
                metrics=metrics,
                settle=settle,
            )
            facts: dict[str, Any] = {
                "fingerprint": model.info.fingerprint,
                "runtime": model.embedder.runtime,
                "device": settings.device,
                "pid": os.getpid(),
            }
            items = (await collections.get()).store.count()
            settle()
            _log.info("ready", extra={**facts, "items": items})
            yield
        finally:
            await collections.close()
            await asyncio.to_thread(registry.workers.close)  # last answers go out meanwhile
            if tracing is not None:
                tracing.close()

    return lifespan


async def _serving_error(request: Request, error: Exception) -> JSONResponse:
    return problem_response(_STATUS[type(error)], str(error), request.scope)


async def _store_error(request: Request, error: Exception) -> JSONResponse:
    # Where the store is and what it said is for who runs this, not for who asks.
    _log.error("the store is unavailable", extra={"reason": str(error)})
    message = (
        "what keeps the collections does not answer, or is damaged: the server's log says which; "
        "try again in a moment"
    )
    return problem_response(503, message, request.scope)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return problem_response(422, in_words(error.errors()), request.scope)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return problem_response(error.status_code, str(error.detail), request.scope, headers)


def _described_problem(code: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        "description": http.HTTPStatus(code).phrase,
        "content": {"application/problem+json": {"schema": schema}},
    }


def _describe_hidden_schemas(app: FastAPI) -> None:
    """Add the schemas of bodies that routes parse themselves to the OpenAPI document."""
    build = app.openapi

    def openapi() -> dict[str, object]:
        document = build()
        schemas = document["components"]["schemas"]
        for schema in _HIDDEN_SCHEMAS:
            tree = schema.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(tree.pop("$defs", {}))
            schemas[schema.__name__] = tree
        return document

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend it
