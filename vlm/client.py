"""A client of the server: the same questions, waiting or not.

    with Client("http://127.0.0.1:8000") as client:
        rows = client.embed(["a red apple", Path("apple.jpg")])
        (answer,) = client.classify([Path("apple.jpg")], labels=["apple", "pear"])

Texts are `str`, images are `Path` or `bytes`. What the server refuses raises `ClientError` with its
own words; where it is only busy, the client waits as long as it is told and asks again.
"""

import asyncio
import base64
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

import httpx
import numpy as np

from vlm.answers import Found, Label, Shown
from vlm.errors import VlmError

__all__ = ["AsyncClient", "Client", "ClientError", "Found", "Label", "Shown"]

Image = Path | bytes
AnswerT = TypeVar("AnswerT")
HttpT = TypeVar("HttpT", httpx.Client, httpx.AsyncClient)
_BUSY: Final = frozenset({429, 503})
_CHUNK: Final = 16
"""Inputs of one request; a server allows 64 unless told otherwise, a careful one 16."""
_CHUNK_CHARACTERS: Final = 8 * 2**20
"""Of them together, unless one alone is longer; a server allows 32 MiB a request."""
_AT_ONCE: Final = 4
"""Requests of one call of the asynchronous client; more would only wait in the server's queue."""
_LONGEST_WAIT: Final = 30.0


class ClientError(VlmError):
    """The server refused, failed, or cannot be reached; the message is its own."""


@dataclass(frozen=True)
class _Call(Generic[AnswerT]):
    """One request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[Any], AnswerT]
    body: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    """By what the server calls them."""


class _Connected(Generic[HttpT]):
    """Where a client asks, and how patiently.

    Args:
        url: Of the server, e.g. `http://127.0.0.1:8000`.
        key: Sent as a bearer token.
        model: Asked where a call names none; by default the server's own default.
        seconds: Longest wait for an answer.
        retries: How often a busy server is asked again.
    """

    _connect: type[HttpT]

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        model: str | None = None,
        seconds: float = 60,
        retries: int = 3,
    ) -> None:
        if key is not None and not (key.isascii() and key.isprintable()):
            message = "the key has characters that no header can carry; a key is printable ASCII"
            raise ClientError(message)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._http: HttpT = self._connect(base_url=url, headers=headers, timeout=seconds)
        self._model = model
        self._retries = retries


class Client(_Connected[httpx.Client]):
    """Asks and waits: `Client(url, key=None, model=None, seconds=60, retries=3)`."""

    _connect = httpx.Client

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def embed(self, inputs: Sequence[str | Image]) -> np.ndarray:
        """Unit float32 rows, [input dim]."""
        return np.concatenate(list(map(self._ask, _embed(inputs, self._model))))

    def classify(self, images: Sequence[Image], **options: Any) -> list[Shown]:
        """What each image shows; `options` are fields of `/v1/classify`, e.g. `labels`."""
        calls = _classify(images, self._model, options)
        return list(chain.from_iterable(map(self._ask, calls)))

    def search(self, query: str | Image, **options: Any) -> list[Found]:
        """Stored items nearest to a text or an image; `options` are `limit` and `filter`."""
        return self._ask(_search(query, self._model, options))

    def caption(self, images: Sequence[Image], **options: Any) -> list[str]:
        """A caption for each image; `options` are `search` and `seed`."""
        calls = _caption(images, self._model, options)
        return list(chain.from_iterable(map(self._ask, calls)))

    def models(self) -> list[str]:
        """Names of what is served, the default first."""
        return self._ask(_MODELS)

    def _ask(self, call: _Call[AnswerT]) -> AnswerT:
        for tries in range(self._retries + 1):
            try:
                answer = self._http.request(call.method, call.path, json=call.body or None)
            except httpx.HTTPError as error:
                raise _unreachable(self._http.base_url, error) from error
            except (TypeError, ValueError) as error:
                raise _not_json(call.path, error) from error
            if answer.status_code not in _BUSY or tries == self._retries:
                break
            time.sleep(_wait_seconds(answer))
        return _read(answer, call)


class AsyncClient(_Connected[httpx.AsyncClient]):
    """The same questions as `Client`, for `await`, with the same arguments."""

    _connect = httpx.AsyncClient

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def embed(self, inputs: Sequence[str | Image]) -> np.ndarray:
        return np.concatenate(await self._ask_all(_embed(inputs, self._model)))

    async def classify(self, images: Sequence[Image], **options: Any) -> list[Shown]:
        calls = _classify(images, self._model, options)
        found = await self._ask_all(calls)
        return list(chain.from_iterable(found))

    async def search(self, query: str | Image, **options: Any) -> list[Found]:
        return await self._ask(_search(query, self._model, options))

    async def caption(self, images: Sequence[Image], **options: Any) -> list[str]:
        found = await self._ask_all(_caption(images, self._model, options))
        return list(chain.from_iterable(found))

    async def models(self) -> list[str]:
        return await self._ask(_MODELS)

    async def _ask_all(self, calls: Sequence[_Call[AnswerT]]) -> list[AnswerT]:
        places = asyncio.Semaphore(_AT_ONCE)

        async def ask(call: _Call[AnswerT]) -> AnswerT:
            async with places:
                return await self._ask(call)

        return await asyncio.gather(*map(ask, calls))

    async def _ask(self, call: _Call[AnswerT]) -> AnswerT:
        for tries in range(self._retries + 1):
            try:
                answer = await self._http.request(call.method, call.path, json=call.body or None)
            except httpx.HTTPError as error:
                raise _unreachable(self._http.base_url, error) from error
            except (TypeError, ValueError) as error:
                raise _not_json(call.path, error) from error
            if answer.status_code not in _BUSY or tries == self._retries:
                break
            await asyncio.sleep(_wait_seconds(answer))
        return _read(answer, call)


def _embed(inputs: Sequence[str | Image], model: str | None) -> list[_Call[np.ndarray]]:
    _refuse_unlisted("inputs", inputs, (str, Path, bytes))
    if not inputs:
        message = "there is nothing to embed: no text and no image"
        raise ClientError(message)
    entries = [entry if isinstance(entry, str) else _url(entry) for entry in inputs]
    return [
        _Call(
            "POST",
            "/v1/embeddings",
            _rows,
            {"input": entries[part], "encoding_format": "base64", "model": model},
            _files("input", inputs[part]),
        )
        for part in _parts(entries)
    ]


def _refuse_unlisted(name: str, given: object, kinds: tuple[type, ...]) -> None:
    """A text is a sequence of texts too, one a letter, which nobody means."""
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        message = f"{name} is one {type(given).__name__}; give a list of them"
        raise ClientError(message)
    for number, entry in enumerate(given):
        _refuse_others(f"{name}.{number}", entry, kinds)


def _refuse_others(name: str, given: object, kinds: tuple[type, ...]) -> None:
    if not isinstance(given, kinds):
        texts = "a text is str, " if str in kinds else ""
        message = f"{name} is a {type(given).__name__}; {texts}an image is a Path or bytes"
        raise ClientError(message)


def _parts(entries: Sequence[str]) -> Iterator[slice]:
    """Stretches that fit into a request each; one for no entries, which the server refuses."""
    start = length = 0
    for n, entry in enumerate(entries):
        if n > start and (n - start == _CHUNK or length + len(entry) > _CHUNK_CHARACTERS):
            yield slice(start, n)
            start, length = n, 0
        length += len(entry)
    yield slice(start, len(entries))


def _rows(tree: Any) -> np.ndarray:
    packed = [base64.b64decode(entry["embedding"]) for entry in tree["data"]]
    return np.stack([np.frombuffer(row, "<f4") for row in packed])


def _classify(
    images: Sequence[Image], model: str | None, options: Mapping[str, Any]
) -> list[_Call[list[Shown]]]:
    def read(tree: Any) -> list[Shown]:
        return [
            Shown(
                labels=[Label(**entry) for entry in result["predictions"]],
                none_of_these=result["none_of_these"],
            )
            for result in tree["results"]
        ]

    return _of_images("/v1/classify", read, images, model, options)


def _search(
    query: str | Image, model: str | None, options: Mapping[str, Any]
) -> _Call[list[Found]]:
    def read(tree: Any) -> list[Found]:
        names = ("id", "score", "text", "metadata")
        return [Found(**{name: hit[name] for name in names}) for hit in tree["results"]]

    _refuse_others("the query", query, (str, Path, bytes))
    asked = {"text": query} if isinstance(query, str) else {"image": _url(query)}
    files = {"image": query} if isinstance(query, Path) else {}
    return _Call("POST", "/v1/search", read, {**asked, "model": model, **options}, files)


def _caption(
    images: Sequence[Image], model: str | None, options: Mapping[str, Any]
) -> list[_Call[list[str]]]:
    def read(tree: Any) -> list[str]:
        return list(tree["captions"])

    return _of_images("/v1/caption", read, images, model, options)


def _of_images(
    path: str,
    read: Callable[[Any], AnswerT],
    images: Sequence[Image],
    model: str | None,
    options: Mapping[str, Any],
) -> list[_Call[AnswerT]]:
    """Calls that each ask the same of some of the images."""
    _refuse_unlisted("images", images, (Path, bytes))
    urls = [_url(image) for image in images]
    return [
        _Call(
            "POST",
            path,
            read,
            {"images": urls[part], "model": model, **options},
            _files("images", images[part]),
        )
        for part in _parts(urls)
    ]


_MODELS: Final[_Call[list[str]]] = _Call(
    "GET", "/v1/models", lambda tree: [model["id"] for model in tree["data"]]
)


def _url(image: Image) -> str:
    try:
        data = image if isinstance(image, bytes) else image.read_bytes()
    except OSError as error:
        message = f"{image!s}: cannot be read ({error.strerror})"
        raise ClientError(message) from error
    # The server looks at the content, so any kind of image may be named.
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _files(field: str, inputs: Sequence[str | Image]) -> dict[str, Path]:
    return {f"{field}.{n}": entry for n, entry in enumerate(inputs) if isinstance(entry, Path)}


def _wait_seconds(answer: httpx.Response) -> float:
    text = answer.headers.get("retry-after", "1")
    return min(float(text) if text.isdecimal() else 1.0, _LONGEST_WAIT)


def _not_json(path: str, error: Exception) -> ClientError:
    return ClientError(f"{path}: what was given cannot be sent as JSON ({error})")


def _unreachable(url: httpx.URL, error: httpx.HTTPError) -> ClientError:
    hint = "is the server there?" if url.host else "an address begins with http:// or https://"
    return ClientError(f"{url}: no answer ({error or type(error).__name__}); {hint}")


def _read(answer: httpx.Response, call: _Call[AnswerT]) -> AnswerT:
    try:
        tree = answer.json()
    except ValueError:
        tree = {}
    if answer.status_code != httpx.codes.OK:
        said = str((isinstance(tree, dict) and tree.get("detail")) or "no reason")
        field, colon, rest = said.partition(": ")
        if colon and field in call.files:
            said = f"{call.files[field]}: {rest}"
        message = f"{call.path}: the server answered {answer.status_code}: {said}"
        raise ClientError(message)
    return call.read(tree)
