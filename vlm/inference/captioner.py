"""Images to captions, from a bundle of a model that writes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from vlm.errors import BundleError
from vlm.inference.bundle import Bundle, BundleInfo, load_bundle
from vlm.inference.generate import (
    BeamSearch,
    ContrastiveSearch,
    GreedySearch,
    NucleusSampling,
    generate,
)
from vlm.models import CoCa
from vlm.preprocess import Pixels, build_detokenizer, normalise_images, resize_image

__all__ = ["Captioner"]


class Captioner:
    """A bundle of kind `coca` as a function from images to captions; no state between calls.

    Args:
        bundle: A loaded bundle.
        device: Where to compute, e.g. `cpu` or `cuda:0`.
        batch_size: Most images of one forward pass.

    Raises:
        BundleError: If the model of the bundle writes no captions.
    """

    def __init__(self, bundle: Bundle, *, device: str = "cpu", batch_size: int = 64) -> None:
        if not isinstance(bundle.model, CoCa):
            message = (
                f"bundle {bundle.info.name!r}: a {bundle.info.model_kind} writes no captions; "
                f"train one with model.type: coca"
            )
            raise BundleError(message)
        self.info: BundleInfo = bundle.info
        self._device = torch.device(device)
        self._batch_size = batch_size
        self._model = bundle.model.to(self._device)
        self._to_text = build_detokenizer(bundle.info.tokenizer)
        vocab_size = len(self._model.text.vocabulary)
        self._start, self._end = vocab_size - 2, vocab_size - 1

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> "Captioner":
        """Load the bundle in `folder`; see `load_bundle` for further errors."""
        return cls(load_bundle(folder), device=device)

    def caption(
        self,
        images: Sequence[Pixels | Image.Image],
        strategy: GreedySearch | BeamSearch | NucleusSampling | ContrastiveSearch | None = None,
        *,
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> list[str]:
        """One caption for each image, by beam search unless told otherwise.

        Args:
            images: Of any size: what `decode_image` returns, or images of Pillow.
            strategy: How tokens are chosen.
            seed: Of the strategy that draws.
            max_tokens: Longest caption in tokens; by default, and at most, what was trained.
        """
        generator = torch.Generator().manual_seed(seed)
        longest = self.info.tokenizer.context_length - 1
        captions = []
        for first in range(0, len(images), self._batch_size):
            part = images[first : first + self._batch_size]
            pixels = np.stack([resize_image(image, self.info.image) for image in part])
            ids = generate(
                self._model,
                self._image_rows(pixels),
                strategy or BeamSearch(),
                start=self._start,
                end=self._end,
                max_tokens=min(max_tokens or longest, longest),
                generator=generator,
            )
            captions += [self._to_text(row) for row in ids.tolist()]
        return captions

    @torch.inference_mode()
    def _image_rows(
        self, pixels: UInt8[np.ndarray, "batch channel height width"]
    ) -> Float[torch.Tensor, "batch place rows_width"]:
        floats = normalise_images(torch.from_numpy(pixels).to(self._device), self.info.image)
        return self._model.image_rows(floats.contiguous(memory_format=torch.channels_last))
