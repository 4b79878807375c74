"""What stands between the network and the routes: limits, keys, origins, headers, request ids."""

import hashlib
import hmac
import json
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.settings import ServingSettings

__all__ = ["GuardMiddleware", "problem_body"]

_OPEN_PATHS = ("/healthz", "/readyz")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
        "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
}


class _TooLargeError(Exception):
    pass


class _GuardedSend:
    """Adds the safe headers and the request id to a response."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            outgoing = MutableHeaders(scope=message)
            outgoing["x-request-id"] = self._request_id
            for name, value in _HEADERS.items():
                outgoing.setdefault(name, value)
        await self._send(message)


class GuardMiddleware:
    """Pure ASGI, so that a body is refused while it streams in, before it is held in memory.

    Args:
        app: The application inside.
        settings: Body limit and hashed keys.
    """

    def __init__(self, app: ASGIApp, settings: ServingSettings) -> None:
        self._app = app
        self._max_body_bytes = settings.max_body_bytes
        self._digests = settings.api_key_sha256

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        guarded = _GuardedSend(send, request_id)
        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is not None:
            await _respond(guarded, *refusal, request_id)
            return
        try:
            await self._app(scope, self._limited(receive), guarded)
        except _TooLargeError:
            if guarded.started:
                raise
            await _respond(guarded, 413, self._too_large(), request_id)

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise _TooLargeError
            return message

        return receive_limited

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            return 413, self._too_large()
        if scope["method"] not in _SAFE_METHODS and not _same_origin(headers):
            return 403, "a page of another site may not change or query anything here"
        if scope["path"] not in _OPEN_PATHS and not self._may_enter(headers):
            return 401, "this server asks for a key: Authorization: Bearer KEY"
        return None

    def _may_enter(self, headers: Headers) -> bool:
        if not self._digests:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.encode()).hexdigest()
        # All are compared, each in constant time: timing tells neither which nor how close.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)

    def _too_large(self) -> str:
        return f"the body is over the limit of {self._max_body_bytes} bytes"


def problem_body(status: int, title: str, detail: str, request_id: str) -> dict[str, str | int]:
    """RFC 9457 problem details."""
    return {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }


def _same_origin(headers: Headers) -> bool:
    """Browsers send Origin with every cross-site write; other clients send none."""
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


async def _respond(send: Send, status: int, detail: str, request_id: str) -> None:
    titles = {401: "Unauthorized", 403: "Forbidden", 413: "Content Too Large"}
    body = json.dumps(problem_body(status, titles[status], detail, request_id)).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
