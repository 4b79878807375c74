"""Images and texts to unit rows, batched over all requests."""

import asyncio
import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from serving.batching import MicroBatcher
from serving.errors import BadInputError
from serving.metrics import Metrics
from serving.services.workers import Workers
from serving.settings import ServingSettings
from vlm.errors import DataError
from vlm.inference import BundleInfo, Encoder
from vlm.preprocess import Pixels, build_tokenizer, decode_image

__all__ = ["Embedder", "Picture", "is_image_url", "make_thumbnail"]

_THUMBNAIL_SIDE = 128


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is kept of an image file: the model's small input, never the full decoded image."""

    pixels: np.ndarray
    """uint8 [channel height width]."""
    thumbnail: bytes | None
    """A small WebP, where one was asked for."""


class Embedder:
    """The encoder behind queues: decoding in a pool, the model on one worker.

    Args:
        encoder: The bundle's two towers.
        settings: Limits and pool sizes.
        metrics: Where sizes and times are told.
        workers: The threads of the server.
    """

    def __init__(
        self, encoder: Encoder, settings: ServingSettings, metrics: Metrics, *, workers: Workers
    ) -> None:
        self._encoder = encoder
        self._decode_seconds = metrics.stages.labels("decode")
        self._tokenize = build_tokenizer(encoder.info.tokenizer)
        self._max_pixels = settings.max_image_pixels
        self._decoders = workers.decoders
        self._device = workers.device
        self._check: asyncio.Future[None] | None = None
        self._images: MicroBatcher[np.ndarray] = MicroBatcher(
            lambda pixels: encoder.encode_pixels(np.stack(pixels)),
            executor=self._device,
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
            tower="image",
            metrics=metrics,
        )
        self._texts: MicroBatcher[str] = MicroBatcher(
            encoder.encode_texts,
            executor=self._device,
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
            tower="text",
            metrics=metrics,
        )

    @property
    def runtime(self) -> str:
        """The name of what computes."""
        return self._encoder.runtime

    @property
    def info(self) -> BundleInfo:
        return self._encoder.info

    async def prepare(
        self, files: Mapping[str, bytes | str], *, thumbnails: bool = False
    ) -> list[Picture]:
        """Decode and resize image files in the pool.

        Args:
            files: The bytes of a file, or its data URL, by the name of the field it came in.
            thumbnails: Whether to make those as well.

        Raises:
            BadInputError: If one is no image or too large; the message names the field.
        """
        loop = asyncio.get_running_loop()
        tasks = [
            loop.run_in_executor(self._decoders, self._prepare_one, field, data, thumbnails)
            for field, data in files.items()
        ]
        return list(await asyncio.gather(*tasks))

    async def image_rows(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Unit float32 rows of prepared images."""
        if not pictures:
            return np.empty((0, self.info.dim), np.float32)
        return await self._images.rows([picture.pixels for picture in pictures])

    async def text_rows(self, texts: Sequence[str]) -> np.ndarray:
        """Unit float32 rows of texts; equal texts are embedded once."""
        if not texts:
            return np.empty((0, self.info.dim), np.float32)
        distinct = list(dict.fromkeys(texts))
        rows = dict(zip(distinct, await self._texts.rows(distinct), strict=True))
        return np.stack([rows[text] for text in texts])

    async def mixed_rows(self, inputs: Sequence[str], *, field: str = "input") -> np.ndarray:
        """Unit rows of texts and of images given as `data:image/…;base64,` URLs, in order.

        Args:
            inputs: At least one.
            field: What messages call them.

        Raises:
            BadInputError: If a data URL is not base64 or not an image.
        """
        is_image = np.array([is_image_url(text) for text in inputs])
        files = {f"{field}.{n}": t for n, t in enumerate(inputs) if is_image[n]}
        texts = [text for text, image in zip(inputs, is_image, strict=True) if not image]
        pictures = await self.prepare(files)
        rows = np.empty((len(inputs), self.info.dim), np.float32)
        rows[is_image], rows[~is_image] = await asyncio.gather(
            self.image_rows(pictures), self.text_rows(texts)
        )
        return rows

    async def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens that the model reads of these texts, start and end marks included."""
        if not texts:
            return 0
        loop = asyncio.get_running_loop()
        token_ids = await loop.run_in_executor(self._decoders, self._tokenize, list(texts))
        return int((token_ids != 0).sum())

    async def check(self, *, seconds: float | None) -> None:
        """Run both towers on something small, ahead of the queues: a busy model is a sound one.

        Raises:
            TimeoutError: If the model does not answer within `seconds`; None waits.
            Exception: Whatever the model raises.
        """
        if self._check is None or self._check.done():  # a stuck model must not gather checks
            loop = asyncio.get_running_loop()
            self._check = loop.run_in_executor(self._device, self._run_both_towers)
        async with asyncio.timeout(seconds):
            await asyncio.shield(self._check)

    def _prepare_one(self, field: str, data: bytes | str, with_thumbnail: bool) -> Picture:
        with self._decode_seconds.time():
            return self._picture(field, data, with_thumbnail)

    def _picture(self, field: str, data: bytes | str, with_thumbnail: bool) -> Picture:
        try:
            file = _data_url_bytes(data) if isinstance(data, str) else data
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
        )

    def _run_both_towers(self) -> None:
        rows = self._encoder.encode_images([Image.new("RGB", (8, 8), "white")])
        texts = self._encoder.encode_texts(["ready"])
        if not (np.isfinite(rows).all() and np.isfinite(texts).all()):
            message = "the model returns numbers that are not finite"
            raise RuntimeError(message)


def is_image_url(text: str) -> bool:
    """Whether an input is to be read as an image; anything else is a text."""
    return text.startswith("data:image/")


def _data_url_bytes(text: str) -> bytes:
    head, _, payload = text.partition(",")
    if not head.endswith(";base64"):
        message = "of the data URLs only base64 ones are understood (data:image/png;base64,...)"
        raise ValueError(message)
    try:
        return base64.b64decode(payload, validate=True)
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
