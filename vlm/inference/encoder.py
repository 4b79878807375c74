"""Images and captions to unit vectors, from a bundle."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64, UInt8
from PIL import Image

from vlm.inference.bundle import Bundle, BundleInfo, load_bundle
from vlm.inference.runtimes.protocol import Runtime
from vlm.inference.runtimes.pytorch import TorchRuntime
from vlm.preprocess import Pixels, build_tokenizer, resize_image, trim_padding

__all__ = ["Encoder"]

Embeddings = Float[np.ndarray, "batch dim"]


class Encoder:
    """The two towers of a bundle, as functions from images and captions to float32 unit rows.

    Stateless between calls. Calls from several threads are safe; they compete for the same cores.

    Args:
        bundle: A loaded bundle.
        device: Where to compute, e.g. `cpu` or `cuda:0`.
        batch_size: Most rows of one forward pass.
        runtime: What computes in place of torch in fp32, see `vlm.inference.runtimes`; the
            bundle's own model is then not kept.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        batch_size: int = 64,
        runtime: Runtime | None = None,
    ) -> None:
        self.info: BundleInfo = bundle.info
        self._batch_size = batch_size
        self._runtime = runtime or TorchRuntime(bundle.model, bundle.info.image, device=device)
        self._tokenize = build_tokenizer(bundle.info.tokenizer)

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> "Encoder":
        """Load the bundle in `folder`; see `load_bundle` for the errors."""
        return cls(load_bundle(folder), device=device)

    @property
    def streams(self) -> int:
        """Calls that are best made at once, from a thread each."""
        return self._runtime.streams

    @property
    def runtime(self) -> str:
        """The name of what computes, e.g. `torch-fp32`."""
        return self._runtime.name

    @property
    def fingerprint(self) -> str:
        return self.info.fingerprint

    @property
    def dim(self) -> int:
        return self.info.dim

    def encode_images(self, images: Sequence[Pixels | Image.Image]) -> Embeddings:
        """Embed images of any size: what `decode_image` returns, or images of Pillow."""
        if not images:
            return np.empty((0, self.dim), np.float32)
        parts = [
            self.encode_pixels(
                np.stack([self.prepare_image(i) for i in images[n : n + self._batch_size]])
            )
            for n in range(0, len(images), self._batch_size)
        ]
        return np.concatenate(parts)

    def prepare_image(
        self, image: Pixels | Image.Image
    ) -> UInt8[np.ndarray, "channel height width"]:
        """The pixels of one image as the model reads them; needs no model, so any thread."""
        return resize_image(image, self.info.image)

    def encode_pixels(
        self, pixels: UInt8[np.ndarray, "batch channel height width"], *, alone: bool = False
    ) -> Embeddings:
        """Embed one batch of stacked `prepare_image` results.

        Args:
            pixels: Of at least one image.
            alone: No other call runs meanwhile, so this one may have the cores of all streams.
        """
        return self._runtime.image_rows(pixels, alone=alone)

    def tokenize(self, texts: Sequence[str]) -> Int64[np.ndarray, "batch token"]:
        """Token ids, 0 where a text has ended; needs no model, so any thread."""
        return self._tokenize(list(texts)).numpy()

    def encode_token_ids(
        self, token_ids: Int64[np.ndarray, "batch token"], *, alone: bool = False
    ) -> Embeddings:
        """Embed one batch of `tokenize` results, which may be trimmed to its longest text.

        `alone` as in `encode_pixels`.
        """
        return self._runtime.text_rows(token_ids, alone=alone)

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed captions; those beyond the context length are cut."""
        if not texts:
            return np.empty((0, self.dim), np.float32)
        token_ids = self._tokenize(list(texts))
        parts = [
            self._runtime.text_rows(trim_padding(chunk).numpy())
            for chunk in token_ids.split(self._batch_size)
        ]
        return np.concatenate(parts)
