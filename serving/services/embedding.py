"""Images and texts to unit rows, batched over all requests."""

import asyncio
import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from serving.batching import MicroBatcher
from serving.errors import BadInputError
from serving.settings import ServingSettings
from vlm.errors import DataError
from vlm.inference import BundleInfo, Encoder
from vlm.preprocess import decode_image

__all__ = ["Embedder", "embed_mixed", "make_thumbnail"]

_THUMBNAIL_SIDE = 128


class Embedder:
    """The encoder behind queues: decoding in a pool, the model on one worker.

    Args:
        encoder: The bundle's two towers.
        settings: Limits and pool sizes.
    """

    def __init__(self, encoder: Encoder, settings: ServingSettings) -> None:
        self._encoder = encoder
        self._max_pixels = settings.max_image_pixels
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._device = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._images: MicroBatcher[np.ndarray] = MicroBatcher(
            lambda pixels: encoder.encode_pixels(np.stack(pixels)),
            executor=self._device,
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
        )
        self._texts: MicroBatcher[str] = MicroBatcher(
            encoder.encode_texts,
            executor=self._device,
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
        )

    @property
    def info(self) -> BundleInfo:
        return self._encoder.info

    async def decode(self, images: Sequence[bytes]) -> list[Image.Image]:
        """Decode image files to RGB.

        Raises:
            BadInputError: If one is no image or too large; the message tells which.
        """
        loop = asyncio.get_running_loop()
        tasks = [
            loop.run_in_executor(self._decoders, self._decode_one, number, data)
            for number, data in enumerate(images)
        ]
        return list(await asyncio.gather(*tasks))

    async def image_rows(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit float32 rows of RGB images."""
        loop = asyncio.get_running_loop()
        prepare = self._encoder.prepare_image
        pixels = await asyncio.gather(
            *(loop.run_in_executor(self._decoders, prepare, image) for image in images)
        )
        return await self._images.rows(pixels)

    async def text_rows(self, texts: Sequence[str]) -> np.ndarray:
        """Unit float32 rows of texts; equal texts are embedded once."""
        distinct = list(dict.fromkeys(texts))
        rows = dict(zip(distinct, await self._texts.rows(distinct), strict=True))
        return np.stack([rows[text] for text in texts])

    async def check(self) -> None:
        """Run both towers on something small; raises whatever they raise."""
        rows = await self.image_rows([Image.new("RGB", (8, 8), "white")])
        texts = await self.text_rows(["ready"])
        if not (np.isfinite(rows).all() and np.isfinite(texts).all()):
            message = "the model returns numbers that are not finite"
            raise RuntimeError(message)

    def close(self) -> None:
        """Finish what is running and end the threads."""
        self._decoders.shutdown()
        self._device.shutdown()

    def _decode_one(self, number: int, data: bytes) -> Image.Image:
        try:
            return decode_image(data, max_pixels=self._max_pixels)
        except DataError as error:
            message = f"image {number}: {error}"
            raise BadInputError(message) from error


async def embed_mixed(embedder: Embedder, inputs: Sequence[str]) -> np.ndarray:
    """Unit rows of texts and of images given as `data:image/…;base64,` URLs, in order.

    Raises:
        BadInputError: If a data URL is not base64 or not an image.
    """
    is_image = [text.startswith("data:image/") for text in inputs]
    files = [_data_url(text) for text, image in zip(inputs, is_image, strict=True) if image]
    texts = [text for text, image in zip(inputs, is_image, strict=True) if not image]
    rows = np.empty((len(inputs), embedder.info.dim), np.float32)
    if files:
        rows[is_image] = await embedder.image_rows(await embedder.decode(files))
    if texts:
        rows[np.logical_not(is_image)] = await embedder.text_rows(texts)
    return rows


def _data_url(text: str) -> bytes:
    head, _, payload = text.partition(",")
    try:
        if not head.endswith(";base64"):
            message = "only base64 data URLs are understood"
            raise ValueError(message)
        return base64.b64decode(payload, validate=True)
    except ValueError as error:
        message = f"a data URL of an image cannot be decoded: {error}"
        raise BadInputError(message) from error


def make_thumbnail(image: Image.Image) -> bytes:
    """A WebP of at most 128 pixels a side, without metadata."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()
