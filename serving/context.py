"""Who is asking: what the guard knows of a request and the queues need, without passing it along.

A context variable, because between the two lie routes and services that have no use for it.
"""

from contextvars import ContextVar
from typing import Final

__all__ = ["CLIENT", "REQUEST_ID"]

CLIENT: Final[ContextVar[str]] = ContextVar("client", default="")
"""The name of the key, or the address; queues take turns between these."""
REQUEST_ID: Final[ContextVar[str]] = ContextVar("request_id", default="")
"""As in the answer's `x-request-id`."""
