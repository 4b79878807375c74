"""Images from other servers, where that is switched on.

A client chooses the address, so none that only this machine or its network reaches may be asked.
A name is resolved once, checked, and connected to as it was checked: it cannot point elsewhere a
moment later. Each redirect goes through all checks again.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urljoin, urlsplit

import httpcore

from serving.errors import BadInputError
from serving.settings import RemoteImages

__all__ = ["Fetcher", "RemoteImage", "is_public"]

Resolve = Callable[[str, int], Awaitable[list[str]]]

_REDIRECTS: Final = (301, 302, 303, 307, 308)
_HEADERS: Final = (
    (b"accept", b"image/*"),
    (b"accept-encoding", b"identity"),
    (b"user-agent", b"vlm"),
)
_FAILURES: Final = (
    OSError,  # TimeoutError too
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
)
# Ranges that carry an IPv4 address inside, beside ::ffff:0:0/96, which ipaddress knows.
_CARRIERS: Final = tuple(
    ipaddress.ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "::/96")
)


def is_public(text: str) -> bool:
    """Whether an address is one of the public internet, and of nothing else.

    Private, loopback, link-local, shared (CGNAT), multicast and reserved addresses are not, nor
    IPv6 forms that carry an IPv4 address.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None or address.teredo is not None:
            return False
        if any(address in network for network in _CARRIERS):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def _resolve(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True)
class RemoteImage:
    """Where an image is said to be."""

    url: str


class Fetcher:
    """Downloads of images within limits.

    Args:
        settings: What may be asked for, and how much may come.
        resolve: From host and port to addresses.
        is_allowed: Whether an address may be connected to.
    """

    def __init__(
        self,
        settings: RemoteImages,
        *,
        resolve: Resolve = _resolve,
        is_allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._settings = settings
        self._backend = _CheckedBackend(resolve, is_allowed)

    async def fetch(self, field: str, url: str) -> bytes:
        """The bytes at an address; what they are is left to the decoder.

        Raises:
            BadInputError: If the address may not be asked for, does not answer in time with 200, or
                sends too much. The message names the field, and nothing of what was found there.
        """
        try:
            async with asyncio.timeout(self._settings.seconds):
                return await self._follow(url)
        except BadInputError as error:
            message = f"{field}: {error}"
            raise BadInputError(message) from error
        except _FAILURES as error:
            message = f"{field}: the address did not answer as it should in time"
            raise BadInputError(message) from error

    async def _follow(self, url: str) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            self._check(url)
            found = await self._get(url)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        message = f"more than {self._settings.max_redirects} redirects"
        raise BadInputError(message)

    async def _get(self, url: str) -> bytes | str:
        """The body, or where it is said to be."""
        # A pool for each request: a kept connection would answer for a name resolved before.
        async with (
            httpcore.AsyncConnectionPool(network_backend=self._backend) as pool,
            pool.stream("GET", url, headers=_headers(url)) as answer,
        ):
            headers = {name.lower(): value for name, value in answer.headers}
            if answer.status in _REDIRECTS and b"location" in headers:
                return headers[b"location"].decode("latin-1")
            if answer.status != 200:
                message = f"the address answered {answer.status}, not 200"
                raise BadInputError(message)
            if headers.get(b"content-encoding", b"identity") != b"identity":
                message = "the address sent a compressed body, which is not opened"
                raise BadInputError(message)
            body = bytearray()
            async for part in answer.aiter_stream():
                body += part
                if len(body) > self._settings.max_bytes:
                    message = f"over the limit of {self._settings.max_bytes} bytes"
                    raise BadInputError(message)
            return bytes(body)

    def _check(self, url: str) -> None:
        settings = self._settings
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
            plain = url.isascii() and url.isprintable() and " " not in url
            plain = plain and all(0 < len(part) < 64 for part in host.removesuffix(".").split("."))
        except ValueError:
            plain, host, port = False, "", 0
        if not plain or not host or parts.username is not None or parts.password is not None:
            message = "not an address of the form https://host/path"
            raise BadInputError(message)
        if parts.scheme not in settings.schemes or port not in settings.ports:
            ports = ", ".join(map(str, settings.ports))
            message = f"only {', '.join(settings.schemes)} on port {ports} may be asked for"
            raise BadInputError(message)
        if settings.hosts and host not in settings.hosts:
            message = "that host is not among those that may be asked for"
            raise BadInputError(message)


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked, and TLS still asks for the name."""

    def __init__(self, resolve: Resolve, is_allowed: Callable[[str], bool]) -> None:
        self._resolve = resolve
        self._is_allowed = is_allowed
        self._plain = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._resolve(host, port)
        # One bad address among good ones is a name that was made to mislead.
        if not addresses or not all(map(self._is_allowed, addresses)):
            message = "the host is not on the public internet"
            raise BadInputError(message)
        return await self._plain.connect_tcp(addresses[0], port, timeout, local_address)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise NotImplementedError

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _headers(url: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", urlsplit(url).netloc.encode()), *_HEADERS]
