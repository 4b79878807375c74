"""What stands between the network and the routes: limits, keys, origins, headers, request ids."""

import base64
import binascii
import hashlib
import hmac
import http
import logging
import secrets
import sys
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ServingError
from serving.metrics import REFUSALS, Metrics
from serving.settings import ServingSettings
from vlm.errors import VlmError

__all__ = ["GuardMiddleware", "problem_response"]

_OPEN_PATHS = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_METHODS = (*_SAFE_METHODS, "POST", "PUT", "PATCH", "DELETE")
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
# Basic makes a browser ask for the key and send it with pictures too; the user name is ignored.
_HEADERS_OF_STATUS = {
    401: {"www-authenticate": 'Bearer, Basic realm="API key as the password"'},
    413: {"connection": "close"},
    503: {"retry-after": "1"},
}
_log = logging.getLogger("serving")


def problem_response(
    status: int, detail: str, scope: Scope, headers: dict[str, str] | None = None
) -> JSONResponse:
    """RFC 9457 problem details; under `/v2` with what the open inference protocol asks for."""
    is_open_inference = scope["path"].startswith("/v2")
    status = 400 if is_open_inference and status == 422 else status
    body = {
        "type": "about:blank",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "request_id": scope["state"]["request_id"],
    }
    if is_open_inference:
        body["error"] = detail
    merged = {**_HEADERS_OF_STATUS.get(status, {}), **(headers or {})}
    return JSONResponse(body, status, merged, media_type="application/problem+json")


class GuardMiddleware:
    """Pure ASGI, so that a body is refused while it streams in, before it is held in memory.

    Args:
        app: The application inside.
        settings: Body limits, hashed keys, names of this host.
        metrics: Where requests and refusals are told.
    """

    def __init__(
        self, app: ASGIApp, settings: ServingSettings, metrics: Metrics | None = None
    ) -> None:
        self._app = app
        self._metrics = Metrics() if metrics is None else metrics
        self._digests = settings.api_key_sha256
        self._host_names = settings.host_names
        self.max_body_bytes = settings.max_body_bytes
        self.max_total_body_bytes = settings.max_total_body_bytes
        self.held_bytes = 0
        """Bodies received by requests that are still in flight."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, _with_plain_failures(send))
            return
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = _Exchange(self, receive, send, request_id)
        start = time.perf_counter()
        exchange.refusal = self._refusal(scope, Headers(scope=scope))
        if exchange.refusal is None:
            await self._run(scope, exchange)
        if exchange.refusal is not None and not exchange.started:
            status, detail = exchange.refusal
            exchange.refusal = None
            await problem_response(status, detail, scope)(scope, receive, exchange.send)
        self._tell(scope, exchange.status, time.perf_counter() - start)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        # Only names that this server knows become labels: no client can make them without end.
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(method, route, str(status)).observe(seconds)
        if status in REFUSALS:
            self._metrics.refusals.labels(str(status)).inc()

    async def _run(self, scope: Scope, exchange: "_Exchange") -> None:
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.started:
                raise
            if exchange.refusal is None:
                _log.error("defect", exc_info=error, extra={"request_id": exchange.request_id})
                exchange.refusal = 500, "the server failed; tell its operator the request id"
        finally:
            self.held_bytes -= exchange.received_bytes

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            return 413, f"the body is over the limit of {self.max_body_bytes} bytes"
        if scope["path"] in _OPEN_PATHS:
            return None
        if not self._is_addressed(headers):
            return 421, "this server does not answer to that host name"
        if scope["method"] not in _SAFE_METHODS and not _same_origin(headers):
            return 403, "a page of another site may not change or query anything here"
        if not self._may_enter(headers):
            return 401, "this server asks for a key: Authorization: Bearer KEY"
        return None

    def _is_addressed(self, headers: Headers) -> bool:
        if not self._host_names:
            return True
        try:
            return urlsplit(f"//{headers.get('host', '')}").hostname in self._host_names
        except ValueError:  # unbalanced brackets
            return False

    def _may_enter(self, headers: Headers) -> bool:
        if not self._digests:
            return True
        digest = hashlib.sha256(_key(headers)).hexdigest()
        # All are compared, each in constant time: timing tells neither which nor how close.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


class _RefusedBodyError(Exception):
    pass


class _Exchange:
    """One request: counts the body that comes in, adds headers to the answer that goes out."""

    def __init__(
        self, guard: GuardMiddleware, receive: Receive, send: Send, request_id: str
    ) -> None:
        self._guard = guard
        self._receive = receive
        self._send = send
        self.request_id = request_id
        self.received_bytes = 0
        self.started = False
        self.status = 0
        self.refusal: tuple[int, str] | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        self.received_bytes += size
        self._guard.held_bytes += size
        if self.received_bytes > self._guard.max_body_bytes:
            self.refusal = 413, f"the body is over the limit of {self._guard.max_body_bytes} bytes"
        elif size and self._guard.held_bytes > self._guard.max_total_body_bytes:
            self.refusal = 503, "too many large requests at once; try again in a second"
        if self.refusal is not None:
            raise _RefusedBodyError
        return message

    async def send(self, message: Message) -> None:
        if self.refusal is not None and not self.started:
            return  # what a route makes of the broken body; the refusal is sent in its place
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            outgoing = MutableHeaders(scope=message)
            outgoing["x-request-id"] = self.request_id
            for name, value in _HEADERS.items():
                outgoing.setdefault(name, value)
        await self._send(message)


def _key(headers: Headers) -> bytes:
    """The key of a request: a bearer token, or the password of basic authentication."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.encode()
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def _same_origin(headers: Headers) -> bool:
    """Browsers send Origin with every cross-site write; other clients send none."""
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc == headers.get("host")
    except ValueError:
        return False


def _with_plain_failures(send: Send) -> Send:
    """Tell why the start failed without a traceback, where a person can do something about it."""

    async def send_plain(message: Message) -> None:
        error = sys.exception()
        if message["type"].endswith(".failed") and isinstance(error, VlmError | ServingError):
            message = {**message, "message": f"cannot start: {error}"}
        await send(message)

    return send_plain
