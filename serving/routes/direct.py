"""A route that FastAPI finds and describes, and leaves alone."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

__all__ = ["DirectRoute"]


class DirectRoute(APIRoute):
    """For what is asked most. A tenth of a request's cost is FastAPI's, for what these do not need.

    The endpoint is given the request, the services and the places of the path, all by name. It
    reads the body itself, and what it answers, a response or a model, is sent as it is.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, without parameters to look for and answers to check."""
        endpoint = self.endpoint

        async def answer(request: Request) -> Response:
            services = request.app.state.services
            found = await endpoint(request=request, services=services, **request.path_params)
            if isinstance(found, Response):
                return found
            return Response(found.model_dump_json(), media_type="application/json")

        return answer
