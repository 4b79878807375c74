"""Images and texts to unit rows, batched over all requests."""

import asyncio
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from serving.batching import MicroBatcher
from serving.caching import RowCache
from serving.encoding import from_base64, is_data_url, without_data_url
from serving.errors import BadInputError
from serving.metrics import Metrics
from serving.services.fetching import Fetcher, RemoteImage
from serving.services.workers import Workers
from serving.settings import ServingSettings
from serving.together import together
from serving.tracing import stage
from vlm.errors import DataError
from vlm.inference import BundleInfo, Encoder
from vlm.preprocess import Pixels, decode_image

__all__ = ["Embedder", "Picture", "is_image", "make_thumbnail"]

_THUMBNAIL_SIDE = 128
_TOKENIZED_AT_ONCE = 1000
"""Characters that take less time than a thread needs to begin."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is kept of an image file: the model's small input, never the full decoded image."""

    pixels: np.ndarray | None
    """uint8 [channel height width]; None where the row is known."""
    thumbnail: bytes | None = None
    """A small WebP, where one was asked for."""
    row: np.ndarray | None = None
    """The embedding, if it was computed before."""
    digest: str = ""
    """SHA-256 of the file."""


class Embedder:
    """The encoder behind queues: decoding in a pool, the model on a worker for each stream.

    Args:
        encoder: The bundle's two towers.
        settings: Limits and pool sizes.
        metrics: Where sizes and times are told.
        workers: The threads of the server.
        cache: Rows computed before; by default none are kept.
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: ServingSettings,
        metrics: Metrics,
        *,
        workers: Workers,
        cache: RowCache | None = None,
    ) -> None:
        self._encoder = encoder
        self._cache = RowCache(0, metrics) if cache is None else cache
        self._cache_name = f"{encoder.fingerprint}/{encoder.runtime}"
        remote = settings.remote_images
        self._fetcher = None if remote is None else Fetcher(remote)
        self._decode_seconds = metrics.stages.labels("decode")
        self._max_pixels = settings.max_image_pixels
        self._decoding = workers.decoding
        self._device = workers.device(encoder.streams)
        self._check: asyncio.Future[None] | None = None
        self._images: MicroBatcher[np.ndarray] = MicroBatcher(
            lambda pixels, alone: encoder.encode_pixels(np.stack(pixels), alone=alone),
            executor=self._device,
            streams=encoder.streams,
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
            heavy=True,
            tower="image",
            metrics=metrics,
        )
        self._texts: MicroBatcher[np.ndarray] = MicroBatcher(
            lambda rows, alone: encoder.encode_token_ids(_padded(rows), alone=alone),
            executor=self._device,
            streams=encoder.streams,
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
            cost=_text_cost,
            tower="text",
            metrics=metrics,
        )

    @property
    def runtime(self) -> str:
        """The name of what computes."""
        return self._encoder.runtime

    @property
    def streams(self) -> int:
        """Batches of a tower that are computed at once."""
        return self._encoder.streams

    @property
    def info(self) -> BundleInfo:
        return self._encoder.info

    async def prepare(
        self,
        files: Mapping[str, bytes | str | RemoteImage],
        *,
        thumbnails: bool = False,
        pixels: bool = False,
    ) -> list[Picture]:
        """Decode and resize image files in the pool.

        Args:
            files: The bytes of a file, its data URL, or where it is to be fetched, by the name of
                the field it came in.
            thumbnails: Whether to make those as well.
            pixels: Whether they are needed even where the row is known.

        Raises:
            BadInputError: If one is no image, too large, or cannot be fetched; the message names
                the field.
        """
        if not files:
            return []
        local = await together(*(self._local(field, file) for field, file in files.items()))
        jobs = [(field, data, thumbnails, pixels) for field, data in zip(files, local, strict=True)]
        with stage("decode", files=len(files)):
            return await self._decoding.run_each(self._prepare_one, jobs)

    async def image_rows(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Unit float32 rows of prepared images."""
        rows = [picture.row for picture in pictures]
        missing = [n for n, row in enumerate(rows) if row is None]
        if missing:
            pixels = [pictures[n].pixels for n in missing]
            with stage("image", items=len(missing)):
                found = await self._images.rows([p for p in pixels if p is not None])
            for n, row in zip(missing, found, strict=True):
                rows[n] = row
                if self._cache.enabled:
                    self._cache.put(self._cache_name, "image", pictures[n].digest, row)
        return self._stacked(rows)

    async def text_rows(
        self, texts: Sequence[str], *, token_ids: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """Unit float32 rows of texts; equal texts are embedded once.

        Args:
            texts: Any number.
            token_ids: What `token_ids` found for them, where it was asked.
        """
        rows: dict[str, np.ndarray | None] = dict.fromkeys(texts)
        if self._cache.enabled:
            rows = {text: self._cache.get(self._cache_name, "text", text) for text in rows}
        missing = [text for text, row in rows.items() if row is None]
        if missing:
            with stage("text", items=len(missing)):
                known = None if token_ids is None else dict(zip(texts, token_ids, strict=True))
                found = await self._texts.rows(
                    [known[text] for text in missing] if known else await self.token_ids(missing)
                )
            for text, row in zip(missing, found, strict=True):
                rows[text] = row
                if self._cache.enabled:
                    self._cache.put(self._cache_name, "text", text, row)
        return self._stacked([rows[text] for text in texts])

    async def mixed_rows(
        self,
        inputs: Sequence[str | RemoteImage],
        *,
        field: str = "input",
        token_ids: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Unit rows of texts and of images, given as `data:image/…;base64,` or remote, in order.

        Args:
            inputs: At least one.
            field: What messages call them.
            token_ids: What `token_ids` found for the texts among them, where it was asked.

        Raises:
            BadInputError: If a data URL is not base64 or not an image.
        """
        images = np.array([is_image(entry) for entry in inputs])
        files = {f"{field}.{n}": entry for n, entry in enumerate(inputs) if images[n]}
        texts = [
            e for e, image in zip(inputs, images, strict=True) if isinstance(e, str) and not image
        ]
        if not files:
            return await self.text_rows(texts, token_ids=token_ids)
        pictures = await self.prepare(files)
        rows = np.empty((len(inputs), self.info.dim), np.float32)
        rows[images], rows[~images] = await together(
            self.image_rows(pictures), self.text_rows(texts, token_ids=token_ids)
        )
        return rows

    async def token_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Of each text its token ids without padding, start and end marks included."""
        if sum(map(len, texts)) <= _TOKENIZED_AT_ONCE:
            return self._tokenized(texts)
        return await self._decoding.run(self._tokenized, texts)

    async def check(self, *, seconds: float | None) -> None:
        """Run both towers on something small, ahead of the queues: a busy model is a sound one.

        Raises:
            TimeoutError: If the model does not answer within `seconds`, or has computed for longer
                on one batch, which of several streams is the one that is stuck; None waits.
            Exception: Whatever the model raises.
        """
        longest = max(self._images.computing_seconds, self._texts.computing_seconds)
        if seconds is not None and longest > seconds:
            message = f"a batch has been computed for {longest:.0f} seconds"
            raise TimeoutError(message)
        if self._check is None or self._check.done():  # a stuck model must not gather checks
            loop = asyncio.get_running_loop()
            self._check = loop.run_in_executor(self._device, self._run_both_towers)
        async with asyncio.timeout(seconds):
            await asyncio.shield(self._check)

    async def _local(self, field: str, file: bytes | str | RemoteImage) -> bytes | str:
        if not isinstance(file, RemoteImage):
            return file
        if self._fetcher is None:
            message = f"{field}: this server fetches no images; send the file itself"
            raise BadInputError(message)
        with stage("fetch"):
            return await self._fetcher.fetch(field, file.url)

    def _tokenized(self, texts: Sequence[str]) -> list[np.ndarray]:
        return list(map(_unpadded, self._encoder.tokenize(texts))) if texts else []

    def _stacked(self, rows: Sequence[np.ndarray | None]) -> np.ndarray:
        known = [row for row in rows if row is not None]
        return np.stack(known) if known else np.empty((0, self.info.dim), np.float32)

    def _prepare_one(
        self, field: str, data: bytes | str, with_thumbnail: bool, with_pixels: bool
    ) -> Picture:
        with self._decode_seconds.time():
            return self._picture(field, data, with_thumbnail, with_pixels)

    def _picture(
        self, field: str, data: bytes | str, with_thumbnail: bool, with_pixels: bool
    ) -> Picture:
        digest = ""
        try:
            file = _data_url_bytes(data) if isinstance(data, str) else data
            if self._cache.enabled and not with_pixels:
                digest = hashlib.sha256(file).hexdigest()
                row = self._cache.get(self._cache_name, "image", digest)
                if row is not None and not with_thumbnail:
                    return Picture(pixels=None, row=row, digest=digest)
            image = decode_image(
                file,
                max_pixels=self._max_pixels,
                min_side=self._encoder.info.image.decode_side(),
            )
        except (DataError, ValueError) as error:
            message = f"{field}: {error}"
            raise BadInputError(message) from error
        return Picture(
            pixels=self._encoder.prepare_image(image),
            thumbnail=make_thumbnail(image) if with_thumbnail else None,
            digest=digest,
        )

    def _run_both_towers(self) -> None:
        rows = self._encoder.encode_images([Image.new("RGB", (8, 8), "white")])
        texts = self._encoder.encode_texts(["ready"])
        if not (np.isfinite(rows).all() and np.isfinite(texts).all()):
            message = "the model returns numbers that are not finite"
            raise RuntimeError(message)


def _text_cost(token_ids: np.ndarray) -> int:
    """Tokens, short texts as 16: what a batch loses by being smaller is more than their padding."""
    return max(16, len(token_ids))


def _unpadded(row: np.ndarray) -> np.ndarray:
    """Token ids up to the end mark, which is never 0; before it, 0 may be a token, `!`."""
    tokens = np.flatnonzero(row)  # a fifth of the time of np.trim_zeros
    return row[: tokens[-1] + 1] if len(tokens) else row[:0]


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Token ids side by side, 0 behind the shorter ones; int64 [batch longest]."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def is_image(entry: str | RemoteImage) -> bool:
    """Whether an input is to be read as an image; anything else is a text."""
    if isinstance(entry, RemoteImage) or is_data_url(entry):
        return True
    return entry[:20].lstrip()[:11].lower() == "data:image/"


def _data_url_bytes(text: str) -> bytes:
    if not is_data_url(text):
        message = "of the data URLs only base64 ones are understood (data:image/png;base64,...)"
        raise ValueError(message)
    try:
        return from_base64(without_data_url(text))
    except ValueError as error:
        message = "the data URL is not valid base64"
        raise ValueError(message) from error


def make_thumbnail(pixels: Pixels) -> bytes:
    """A WebP of at most 128 pixels a side, without metadata."""
    small = Image.fromarray(pixels)
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()
