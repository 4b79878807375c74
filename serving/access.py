"""Who may do what, and how often: API keys, scopes, rate limits."""

import base64
import binascii
import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from starlette.datastructures import Headers

from serving.exchange import Refusal
from serving.settings import ApiKey, Scope, ServingSettings

__all__ = ["SAFE_METHODS", "Access", "scope_of"]

SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")
# These change nothing, though they are sent with POST.
_QUESTIONS: Final = re.compile(
    r"/v1/(classify|embeddings|similarity|search|caption)|/v2/models/[^/]+/infer"
)
_NO_KEY: Final = "this server asks for a key: Authorization: Bearer KEY"
_NOT_KNOWN: Final = "the key that was sent is none of this server's"
_ADMINISTRATION: Final = re.compile(r"/v1/models/.*", re.DOTALL)


def scope_of(method: str, path: str) -> Scope:
    """What a key must be allowed: to ask, to change the collection or label sets, or the server."""
    if method in SAFE_METHODS or _QUESTIONS.fullmatch(path):
        return "read"
    return "admin" if _ADMINISTRATION.fullmatch(path) else "write"


@dataclass
class _Bucket:
    """Tokens that come back with time; a request takes one."""

    per_second: float
    capacity: float
    tokens: float
    filled: float = 0.0

    def wait_seconds(self, now: float) -> float:
        """Take a token, 0; or how long until there is one."""
        self.tokens = min(self.capacity, self.tokens + (now - self.filled) * self.per_second)
        self.filled = now
        if self.tokens >= 1:
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) / self.per_second


@dataclass(frozen=True)
class _Known:
    key: ApiKey
    bucket: _Bucket | None = field(hash=False)


class Access:
    """The keys of a server. Without any, everybody may ask and write.

    Args:
        settings: Keys, and where the server listens.
        clock: Seconds that only go forward.
    """

    def __init__(
        self, settings: ServingSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._known = [_Known(key, _bucket(key, clock())) for key in _keys(settings)]
        self._open_scopes: Sequence[Scope] = (
            ("read", "write", "admin") if settings.is_loopback else ("read", "write")
        )

    def refusal(self, method: str, path: str, headers: Headers) -> Refusal | None:
        """Why somebody may not do this; None for who may."""
        scope = scope_of(method, path)
        if not self._known:
            if scope in self._open_scopes:
                return None
            detail = "models are changed with a key of scope admin, and this server has no keys"
            return Refusal(403, detail)
        known = self._find(headers)
        if known is None:
            return Refusal(401, _NOT_KNOWN if _key(headers) else _NO_KEY)
        if scope not in known.key.scopes:
            has = ", ".join(known.key.scopes)
            return Refusal(403, f"this needs a key of scope {scope}; yours has {has}")
        wait = 0.0 if known.bucket is None else known.bucket.wait_seconds(self._clock())
        if wait > 0:
            detail = f"over {known.key.requests_per_minute:g} requests a minute with this key"
            return Refusal(429, detail, {"retry-after": str(math.ceil(wait))})
        return None

    def name(self, headers: Headers) -> str | None:
        """The name of the key that a request brings."""
        known = self._find(headers)
        return None if known is None else known.key.name

    def _find(self, headers: Headers) -> _Known | None:
        if not self._known:
            return None
        digest = hashlib.sha256(_key(headers)).hexdigest()
        # All are compared, each in constant time: timing tells neither which nor how close.
        matches = [k for k in self._known if hmac.compare_digest(digest, k.key.sha256)]
        return matches[0] if matches else None


def _keys(settings: ServingSettings) -> list[ApiKey]:
    """Named keys, and the digests of `api_key_sha256`, which may ask and write without limit."""
    plain = [
        ApiKey(name=f"key-{number}", sha256=digest, scopes=["read", "write"])
        for number, digest in enumerate(settings.api_key_sha256)
    ]
    return [*settings.keys, *plain]


def _bucket(key: ApiKey, now: float) -> _Bucket | None:
    if key.requests_per_minute is None:
        return None
    capacity = float(key.burst)
    return _Bucket(key.requests_per_minute / 60, capacity, capacity, now)


def _key(headers: Headers) -> bytes:
    """The key of a request: a bearer token, or the password of basic authentication."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.encode()
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""
