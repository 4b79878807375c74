"""What stands between the network and the routes: limits, keys, origins, deadlines, headers."""

import asyncio
import http
import logging
import math
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access import SAFE_METHODS, Access, scope_of
from serving.context import CLIENT, REQUEST_ID
from serving.errors import ServingError
from serving.exchange import BodyLimits, Exchange, Refusal
from serving.metrics import REFUSALS, Metrics
from serving.settings import ServingSettings
from serving.tracing import Tracing
from vlm.errors import VlmError

__all__ = ["GuardMiddleware", "problem_response"]

_OPENAI_PATHS = ("/v1/embeddings", "/v1/models")
_OPEN_PATHS = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
_METHODS = (*SAFE_METHODS, "POST", "PUT", "PATCH", "DELETE")
_HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
        b"form-action 'self'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
)
# Basic makes a browser ask for the key and send it with pictures too; the user name is ignored.
_HEADERS_OF_STATUS = {
    401: {"www-authenticate": 'Bearer, Basic realm="API key as the password"'},
    413: {"connection": "close"},
    503: {"retry-after": "1"},
}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_TIMEOUT: Final = "x-request-timeout"
_ENDING: Final = Refusal(503, "the server ended before this was done; ask another, or later")
_GONE: Final = Refusal(499, "the client hung up")
_log = logging.getLogger("serving")


def problem_response(
    status: int, detail: str, scope: Scope, headers: dict[str, str] | None = None
) -> JSONResponse:
    """RFC 9457 problem details, with what clients of other protocols look for.

    That is an `error`: under `/v2` a text, where OpenAI's clients ask an object with a `message`.
    """
    is_open_inference = scope["path"].startswith("/v2")
    status = 400 if is_open_inference and status == 422 else status
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": _phrase(status),
        "status": status,
        "detail": detail,
        "request_id": scope["state"]["request_id"],
    }
    if is_open_inference:
        body["error"] = detail
    elif scope["path"].startswith(_OPENAI_PATHS):
        body["error"] = {"message": detail, "type": body["title"], "param": None, "code": None}
    merged = {**_HEADERS_OF_STATUS.get(status, {}), **(headers or {})}
    return JSONResponse(body, status, merged, media_type="application/problem+json")


def _phrase(status: int) -> str:
    return "Client Closed Request" if status == _GONE.status else http.HTTPStatus(status).phrase


class GuardMiddleware:
    """Pure ASGI, so that a body is refused while it streams in, before it is held in memory.

    Args:
        app: The application inside.
        settings: Body limits, keys, names of this host.
        metrics: Where requests and refusals are told.
        tracing: Where spans go, if anywhere.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServingSettings,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._metrics = Metrics() if metrics is None else metrics
        self._tracing = tracing
        self._access = Access(settings)
        self._settings = settings
        self._limits = BodyLimits(settings.max_body_bytes, settings.max_total_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, _with_plain_failures(send))
            return
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        headers = Headers(scope=scope)
        client = self._access.name(headers) or str((scope.get("client") or ("",))[0])
        tokens = CLIENT.set(client), REQUEST_ID.set(request_id)
        try:
            if self._tracing is None:
                await self._answer(scope, receive, send, headers)
                return
            with self._tracing.request(scope["method"], headers, request_id) as span:
                status = await self._answer(scope, receive, send, headers)
                route = _route(scope)
                span.update_name(f"{scope['method']} {route}")
                span.set_attributes({"http.route": route, "http.response.status_code": status})
        finally:
            CLIENT.reset(tokens[0])
            REQUEST_ID.reset(tokens[1])

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> int:
        start = time.perf_counter()
        exchange = Exchange(
            self._limits, receive, send, request_id=REQUEST_ID.get(), headers=_HEADERS
        )
        exchange.refusal = self._refusal(scope, headers)
        if exchange.refusal is None:
            try:
                seconds = self._seconds(scope, headers)
            except ValueError as error:
                exchange.refusal = Refusal(400, str(error))
            else:
                await self._run(scope, exchange, seconds)
        if exchange.refusal is not None and not exchange.started:
            refusal = exchange.refusal
            exchange.refusal = None
            answer = problem_response(refusal.status, refusal.detail, scope, dict(refusal.headers))
            await answer(scope, receive, exchange.send)
        self._tell(scope, exchange.status, time.perf_counter() - start)
        return exchange.status

    async def _run(self, scope: Scope, exchange: Exchange, seconds: float | None) -> None:
        """The application, until it is done, the time is over, or the client has gone."""
        try:
            with _given_up(exchange, seconds):
                await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.refusal = exchange.refusal or _GONE
        except Exception as error:
            if exchange.started:
                raise
            if exchange.refusal is None:
                _log.error("defect", exc_info=error, extra={"request_id": exchange.request_id})
                exchange.refusal = Refusal(
                    500, "the server failed; tell its operator the request id"
                )

    def _seconds(self, scope: Scope, headers: Headers) -> float | None:
        """How long a request may take; loading a model takes as long as it takes."""
        most = self._settings.request_seconds
        text = headers.get(_TIMEOUT)
        if text is None:
            return None if scope_of(scope["method"], scope["path"]) == "admin" else most
        try:
            asked = float(text)
        except ValueError:
            asked = math.nan
        if not asked > 0:
            message = f"{_TIMEOUT} is seconds, a number over 0, found {text[:32]!r}"
            raise ValueError(message)
        return min(asked, most)

    def _refusal(self, scope: Scope, headers: Headers) -> Refusal | None:
        length = headers.get("content-length", "0")
        most = self._limits.max_body_bytes
        if length.isdecimal() and int(length) > most:
            return Refusal(413, f"the body is over the limit of {most} bytes")
        if _CONTROL.search(scope["path"]):
            # Routes would take a path that ends in a line break for the one without.
            return Refusal(400, "the path holds a control character")
        if scope["path"] in _OPEN_PATHS:
            return None
        if not self._is_addressed(headers):
            return Refusal(421, "this server does not answer to that host name")
        if scope["method"] not in SAFE_METHODS and not _same_origin(headers):
            return Refusal(403, "a page of another site may not change or query anything here")
        return self._access.refusal(scope["method"], scope["path"], headers)

    def _is_addressed(self, headers: Headers) -> bool:
        names = self._settings.host_names
        if not names:
            return True
        try:
            return urlsplit(f"//{headers.get('host', '')}").hostname in names
        except ValueError:  # unbalanced brackets
            return False

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        # Only names that this server knows become labels: no client can make them without end.
        route = _route(scope)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(method, route, str(status)).observe(seconds)
        if status in REFUSALS:
            self._metrics.refusals.labels(str(status)).inc()
        if self._settings.access_log:
            facts = {"method": method, "route": route, "status": status, "client": CLIENT.get()}
            _log.info("request", extra={**facts, "ms": round(1000 * seconds, 1)})


@contextmanager
def _given_up(exchange: Exchange, seconds: float | None) -> Iterator[None]:
    """Cancel what runs inside, in this task, when it is too late or for nobody.

    The application has no task of its own, which would be one more to make and wait for.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def give_up(refusal: Refusal) -> None:
        if not exchange.finished and exchange.refusal is None:
            exchange.refusal = refusal
            task.cancel()

    left = loop.create_task(exchange.client_left())
    left.add_done_callback(lambda done: None if done.cancelled() else give_up(_GONE))
    late = None
    if seconds is not None:
        late = loop.call_later(seconds, lambda: give_up(_late(seconds)))
    try:
        yield
    except asyncio.CancelledError:
        if exchange.refusal is None:
            exchange.refusal = _ENDING
        task.uncancel()
    finally:
        left.cancel()
        if late is not None:
            late.cancel()
        exchange.close()


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "other"))


def _late(seconds: float | None) -> Refusal:
    return Refusal(504, f"not answered within {seconds:g} seconds; it was given up")


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
