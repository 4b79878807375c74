"""Images and captions to unit vectors, from a bundle."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vlm.inference.bundle import Bundle, BundleInfo, load_bundle
from vlm.preprocess import build_tokenizer, normalise_images, stack_images, trim_padding

__all__ = ["Encoder"]

Embeddings = Float[np.ndarray, "batch dim"]


class Encoder:
    """The two towers of a bundle, as functions from images and captions to float32 unit rows.

    Stateless between calls. Calls from several threads are safe; they compete for the same cores.

    Args:
        bundle: A loaded bundle.
        device: Where to compute, e.g. `cpu` or `cuda:0`.
        batch_size: Most rows of one forward pass.
    """

    def __init__(self, bundle: Bundle, *, device: str = "cpu", batch_size: int = 64) -> None:
        self.info: BundleInfo = bundle.info
        self._device = torch.device(device)
        self._batch_size = batch_size
        self._model = bundle.model.to(self._device)
        self._tokenize = build_tokenizer(bundle.info.tokenizer)

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> "Encoder":
        """Load the bundle in `folder`; see `load_bundle` for the errors."""
        return cls(load_bundle(folder), device=device)

    @property
    def fingerprint(self) -> str:
        return self.info.fingerprint

    @property
    def dim(self) -> int:
        return self.info.dim

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """Embed RGB images of any size."""
        if not images:
            return np.empty((0, self.dim), np.float32)
        parts = [
            self.encode_pixels(stack_images(images[i : i + self._batch_size], self.info.image))
            for i in range(0, len(images), self._batch_size)
        ]
        return np.concatenate(parts)

    @torch.inference_mode()
    def encode_pixels(self, pixels: UInt8[Tensor, "batch channel height width"]) -> Embeddings:
        """Embed one batch that `vlm.preprocess.stack_images` made."""
        floats = normalise_images(pixels.to(self._device), self.info.image)
        floats = floats.contiguous(memory_format=torch.channels_last)
        return self._model.encode_image(floats).cpu().numpy()

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed captions; those beyond the context length are cut."""
        if not texts:
            return np.empty((0, self.dim), np.float32)
        token_ids = self._tokenize(list(texts))
        parts = [
            self._model.encode_text(trim_padding(chunk).to(self._device)).cpu().numpy()
            for chunk in token_ids.split(self._batch_size)
        ]
        return np.concatenate(parts)
