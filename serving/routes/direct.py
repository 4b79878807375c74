"""Routes that FastAPI describes, and that are found and answered without it."""

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["DirectMiddleware", "DirectRoute"]

Handlers = Mapping[type[Exception], Callable[[Request, Any], Awaitable[Response]]]


class DirectRoute(APIRoute):
    """For what is asked most: a quarter of a request's cost is FastAPI's, which these do not need.

    The endpoint is given the request, the services and the places of the path, all by name. It
    reads the body itself, and what it answers, a response or a model, is sent as it is.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, without parameters to look for and answers to check."""
        return self.answer

    async def answer(self, request: Request) -> Response:
        """What the endpoint has to say."""
        services = request.app.state.services
        found = await self.endpoint(request=request, services=services, **request.path_params)
        if isinstance(found, Response):
            return found
        return Response(found.model_dump_json(), media_type="application/json")


class DirectMiddleware:
    """Finds a direct route by its path alone, where FastAPI tries one route after the other.

    What else is asked goes on to the application inside, which knows these routes as well.

    Args:
        app: The application inside.
        routers: Whose direct routes without places in their path are answered here.
        handlers: What is answered to errors, those of a class itself before those of its bases.
    """

    def __init__(self, app: ASGIApp, routers: Iterable[APIRouter], handlers: Handlers) -> None:
        self._app = app
        self._handlers = handlers
        routes = [route for router in routers for route in router.routes]
        self._routes = {
            (method, route.path): route
            for route in routes
            if isinstance(route, DirectRoute) and not route.param_convertors
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope.get("method", ""), scope.get("path", "")))
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive, send)
        try:
            response = await route.answer(request)
        except Exception as error:
            handle = next(filter(None, map(self._handlers.get, type(error).__mro__)), None)
            if handle is None:
                raise
            response = await handle(request, error)
        await response(scope, receive, send)
