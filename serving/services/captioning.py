"""Captions of images, by models that write."""

import asyncio
from collections.abc import Sequence
from typing import Final

import numpy as np
from pydantic import TypeAdapter

from serving.errors import OverloadedError
from serving.services.embedding import Embedder
from serving.services.fetching import RemoteImage
from serving.services.workers import Workers
from serving.tracing import stage
from vlm.inference import Captioner, Strategy

__all__ = ["CaptionWriter"]

_STRATEGY: Final[TypeAdapter[Strategy]] = TypeAdapter(Strategy)


class CaptionWriter:
    """Writes one request's captions at a time, on the thread that computes everything.

    Args:
        captioner: The model.
        embedder: Of the same bundle: it decodes and resizes.
        workers: The threads of the server.
        max_waiting: Images that may wait; a request that would exceed it is refused.
    """

    def __init__(
        self, captioner: Captioner, embedder: Embedder, *, workers: Workers, max_waiting: int
    ) -> None:
        self._captioner = captioner
        self._embedder = embedder
        self._device = workers.device(1)
        self._max_waiting = max_waiting
        self._waiting = 0

    async def captions(
        self, images: Sequence[bytes | RemoteImage], search: str, *, seed: int
    ) -> list[str]:
        """One caption for each image.

        Args:
            images: Files, or where they are.
            search: How tokens are chosen: `greedy`, `beam`, `nucleus` or `contrastive`.
            seed: Of the search that draws.

        Raises:
            BadInputError: If an image cannot be decoded.
            OverloadedError: If too many images wait already.
        """
        if self._waiting and self._waiting + len(images) > self._max_waiting:
            message = "too many images wait for a caption; try again in a second"
            raise OverloadedError(message)
        self._waiting += len(images)
        try:
            files = {f"images.{number}": image for number, image in enumerate(images)}
            pictures = await self._embedder.prepare(files, pixels=True)
            strategy = _STRATEGY.validate_python({"type": search})
            pixels = [p.pixels.transpose(1, 2, 0) for p in pictures if p.pixels is not None]
            loop = asyncio.get_running_loop()
            with stage("caption", items=len(images)):
                return await loop.run_in_executor(self._device, self._write, pixels, strategy, seed)
        finally:
            self._waiting -= len(images)

    def _write(self, pixels: list[np.ndarray], strategy: Strategy, seed: int) -> list[str]:
        return self._captioner.caption(pixels, strategy, seed=seed)
