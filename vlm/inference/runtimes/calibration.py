"""Pairs on which runtimes are compared and 8-bit ranges are found."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from vlm.errors import DataError
from vlm.preprocess import (
    HuggingFaceTokenizerConfig,
    ImageConfig,
    TokenizerConfig,
    build_tokenizer,
    prepare_image,
    resize_image,
    trim_padding,
)

__all__ = ["DEFAULT_PAIRS", "Calibration", "calibration_pairs", "drawn_calibration"]

DEFAULT_PAIRS: Final = 400
_COLOURS: Final = (
    "red", "green", "blue", "yellow", "black", "white", "orange", "purple", "gray", "brown",
    "pink", "cyan",
)  # fmt: skip
_SHAPES: Final = ("circle", "square", "triangle", "ring", "cross")
_SIZES: Final = {"small": 0.2, "large": 0.4}
_Scene = tuple[str, str, str, str]  # size, colour, shape, ground


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Images with a caption each; no caption twice, so that the best one is one."""

    pixels: UInt8[np.ndarray, "batch channel height width"]
    texts: list[str]
    origin: str
    """Where the pairs come from, for people."""

    def halves(self) -> tuple["Calibration", "Calibration"]:
        """Every other pair: what ranges were fitted to must not judge them."""
        return self._every_other(0), self._every_other(1)

    def _every_other(self, first: int) -> "Calibration":
        texts = self.texts[first::2]
        origin = f"{len(texts)} of {self.origin}"
        return Calibration(pixels=self.pixels[first::2], texts=texts, origin=origin)

    def pixel_batches(self, *, batch: int) -> list[np.ndarray]:
        """The images in batches of equal size but the last."""
        return [self.pixels[n : n + batch] for n in range(0, len(self.pixels), batch)]

    def token_ids(
        self, tokenizer: TokenizerConfig | HuggingFaceTokenizerConfig, *, batch: int
    ) -> list[np.ndarray]:
        """Token ids of the texts in the same batches, each trimmed to its longest text."""
        token_ids = build_tokenizer(tokenizer)(list(self.texts))
        return [trim_padding(chunk).numpy() for chunk in token_ids.split(batch)]


def drawn_calibration(
    image: ImageConfig, *, count: int = DEFAULT_PAIRS, seed: int = 0
) -> Calibration:
    """Coloured shapes on coloured grounds, e.g. "a large red ring on a blue ground".

    Good enough to find a broken or coarse runtime. A trained model's own kind of pictures shows
    more: use `calibration_pairs` where there are shards.

    Args:
        image: The model's input.
        count: At most 1,320, the number of different scenes.
        seed: Which scenes, and where in the picture.
    """
    scenes: list[_Scene] = [
        scene
        for scene in itertools.product(_SIZES, _COLOURS, _SHAPES, _COLOURS)
        if scene[1] != scene[3]
    ]
    generator = np.random.default_rng(seed)
    chosen = [scenes[i] for i in generator.permutation(len(scenes))[:count]]
    return Calibration(
        pixels=np.stack([resize_image(_drawn(scene, generator), image) for scene in chosen]),
        texts=[
            f"a {size} {colour} {shape} on a {ground} ground"
            for size, colour, shape, ground in chosen
        ],
        origin=f"{len(chosen)} drawn pairs",
    )


def calibration_pairs(
    folder: Path, image: ImageConfig, *, count: int = DEFAULT_PAIRS
) -> Calibration:
    """Pairs evenly spread over a dataset, without those whose caption came before.

    Raises:
        DataError: If the folder is no dataset, a sample is damaged, or fewer than four captions
            differ.
    """
    from vlm.data.manifest import open_manifest  # noqa: PLC0415 - only with shards
    from vlm.data.sequential import iterate_samples  # noqa: PLC0415 - webdataset costs a second

    step = max(1, open_manifest(folder).num_samples // count)
    images: dict[str, np.ndarray] = {}
    every: Iterator[int] = itertools.count()
    for number, sample in zip(every, iterate_samples(folder), strict=False):
        if number % step == 0 and sample.text not in images and len(images) < count:
            images[sample.text] = prepare_image(sample.image, image)
    if len(images) < 4:
        message = f"{folder}: {len(images)} different captions, and calibration needs at least 4"
        raise DataError(message)
    return Calibration(
        pixels=np.stack(list(images.values())),
        texts=list(images),
        origin=f"{len(images)} pairs of {folder.name}",
    )


def _drawn(scene: _Scene, generator: np.random.Generator) -> Image.Image:
    size, colour, shape, ground = scene
    side = 256
    image = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(image)
    radius = side * _SIZES[size]
    x, y = generator.uniform(radius, side - radius, size=2)
    box = (x - radius, y - radius, x + radius, y + radius)
    thin = radius / 3
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=round(thin))
    else:
        pen.rectangle((x - thin, box[1], x + thin, box[3]), fill=colour)
        pen.rectangle((box[0], y - thin, box[2], y + thin), fill=colour)
    return image
