"""One request and its answer, seen from outside the routes: counted, and watched."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from starlette.types import Message, Receive, Send

__all__ = ["BodyLimits", "Exchange", "Refusal", "RefusedBodyError"]


@dataclass(frozen=True)
class Refusal:
    """What is answered in place of a route."""

    status: int
    detail: str
    headers: Mapping[str, str] = field(default_factory=dict)


class RefusedBodyError(Exception):
    """Ends whatever reads a body that is not wanted."""


@dataclass
class BodyLimits:
    """How much may be held, and how much is."""

    max_body_bytes: int
    max_total_body_bytes: int
    held_bytes: int = 0
    """Bodies received by requests that are still in flight."""


class Exchange:
    """Counts the body that comes in, adds headers to the answer that goes out."""

    def __init__(
        self,
        limits: BodyLimits,
        receive: Receive,
        send: Send,
        *,
        request_id: str,
        headers: Sequence[tuple[bytes, bytes]],
    ) -> None:
        self._limits = limits
        self._receive = receive
        self._send = send
        self._headers = headers
        self.request_id = request_id
        self.received_bytes = 0
        self.started = False
        self.finished = False
        self.status = 0
        self.refusal: Refusal | None = None
        self._body_is_read = asyncio.Event()
        self._left = asyncio.Event()

    async def client_left(self) -> None:
        """Return when the client has hung up; while the body comes in, only its reader notices."""
        await self._body_is_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left.set()

    async def receive(self) -> Message:
        """What the application is given in place of the server's own function."""
        if self._body_is_read.is_set():
            await self._left.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        size = len(message.get("body", b""))
        self.received_bytes += size
        self._limits.held_bytes += size
        if self.received_bytes > self._limits.max_body_bytes:
            detail = f"the body is over the limit of {self._limits.max_body_bytes} bytes"
            self.refusal = Refusal(413, detail)
        elif size and self._limits.held_bytes > self._limits.max_total_body_bytes:
            self.refusal = Refusal(503, "too many large requests at once; try again in a second")
        if self.refusal is not None:
            raise RefusedBodyError
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._body_is_read.set()
            if message["type"] == "http.disconnect":
                self._left.set()
        return message

    async def send(self, message: Message) -> None:
        """What the application is given in place of the server's own function."""
        if self.refusal is not None and not self.started:
            return  # what a route makes of the broken body; the refusal is sent in its place
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            own = list(message.get("headers", ()))
            given = {name.lower() for name, _ in own}
            message["headers"] = [
                *own,
                (b"x-request-id", self.request_id.encode()),
                *(header for header in self._headers if header[0] not in given),
            ]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.finished = True
        await self._send(message)

    def close(self) -> None:
        """Give back what the body took of the limits."""
        self._limits.held_bytes -= self.received_bytes
        self.received_bytes = 0
