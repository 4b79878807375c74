"""The application: settings in, FastAPI out. Nothing happens before its lifespan starts."""

import http
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import vlm
from serving.errors import BadInputError, NotFoundError, OverloadedError
from serving.routes import routers
from serving.routes.pages import static_mounts
from serving.routes.state import Services
from serving.schemas import ItemsRequest, Problem
from serving.security import GuardMiddleware, problem_response
from serving.services.embedding import Embedder
from serving.services.retrieval import Retriever
from serving.settings import ServingSettings
from serving.stores import EmbeddedStore
from vlm.inference import Encoder

__all__ = ["create_app"]

_log = logging.getLogger("serving")
_STATUS: dict[type[Exception], int] = {BadInputError: 422, NotFoundError: 404, OverloadedError: 503}


def create_app(settings: ServingSettings) -> FastAPI:
    """The server of one bundle and its collection.

    The bundle is loaded, verified and run once before the server is ready.

    Raises (at start):
        BundleError: If the bundle cannot be loaded or trusted.
        FingerprintError: If the index holds another model's vectors.
    """
    app = FastAPI(
        title="vlm",
        version=vlm.__version__,
        description="Zero-shot classification, embeddings and cross-modal search.",
        lifespan=_lifespan(settings),
        docs_url=None,
        redoc_url=None,
        responses={
            code: {"model": Problem, "description": http.HTTPStatus(code).phrase}
            for code in (400, 401, 403, 404, 413, 415, 421, 422, 503)
        },
    )
    for router in routers:
        app.include_router(router)
    for path, files in static_mounts().items():
        app.mount(path, files)
    app.add_middleware(GuardMiddleware, settings=settings)
    for error_class in _STATUS:
        app.add_exception_handler(error_class, _serving_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    _describe_hidden_schemas(app)
    return app


def _lifespan(
    settings: ServingSettings,
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        encoder = Encoder.load(settings.bundle, device=settings.device)
        store = EmbeddedStore(settings.index, fingerprint=encoder.fingerprint, dim=encoder.dim)
        embedder = Embedder(encoder, settings)
        await embedder.check(seconds=None)  # warm up, and fail before anybody is sent here
        retriever = Retriever(embedder, store)
        app.state.services = Services(settings=settings, embedder=embedder, retriever=retriever)
        _log.info("ready", extra={"fingerprint": encoder.fingerprint[:12], "items": store.count()})
        yield
        embedder.close()

    return lifespan


async def _serving_error(request: Request, error: Exception) -> JSONResponse:
    return problem_response(_STATUS[type(error)], str(error), request.state.request_id)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    lines = [
        f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}"
        for detail in error.errors()
    ]
    return problem_response(422, "; ".join(lines), request.state.request_id)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return problem_response(error.status_code, str(error.detail), request.state.request_id, headers)


def _describe_hidden_schemas(app: FastAPI) -> None:
    """Add the schemas of bodies that routes parse themselves to the OpenAPI document."""
    build = app.openapi

    def openapi() -> dict[str, object]:
        document = build()
        schemas = document["components"]["schemas"]
        tree = ItemsRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(tree.pop("$defs", {}))
        schemas["ItemsRequest"] = tree
        return document

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend it
