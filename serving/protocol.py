"""HTTP/1.1 of uvicorn's, which also ends a connection whose request does not arrive.

uvicorn bounds how long a connection may idle between requests, not how long the first one, or the
head of any, may take to come in. The body has the time of its request.

Nor does it end one on which a body goes on to trickle in that was answered before it was read.

And it closes connections at a shutdown without saying so in their last answers: a client that sends
its next request at once would lose it.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HeadTimeoutProtocol"]


class HeadTimeoutProtocol(H11Protocol):
    """Closes a connection on which a request's head is not whole in time.

    Args:
        head_seconds: From the connection, or the first byte of a later request, to the empty line;
            and from an answer to the end of its request's body.
        arguments: uvicorn's.
    """

    def __init__(self, *, head_seconds: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._head_seconds = head_seconds
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn narrows it
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop_draining()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_draining()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            end = self.timeout_keep_alive_handler
            self._body_timer = self.loop.call_later(self._head_seconds, end)

    def shutdown(self) -> None:
        super().shutdown()
        if self.cycle is not None and not self.cycle.response_started:
            close = (b"connection", b"close")
            self.cycle.default_headers = [*self.cycle.default_headers, close]

    def _await_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._head_timer is None:
            # As uvicorn ends an idle connection: nobody has asked, so nothing is answered.
            end = self.timeout_keep_alive_handler
            self._head_timer = self.loop.call_later(self._head_seconds, end)

    def _stop_draining(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
