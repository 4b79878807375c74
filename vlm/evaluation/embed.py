"""Datasets to embeddings: every rank embeds its share, all have all rows, in order of the samples.

Images and captions go through the towers in chunks of a fixed grid of samples, so that a batch
holds the same samples whatever the number of ranks, and rounds the same.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.distributed import World, gather_bytes, gather_uneven_rows
from vlm.errors import BundleError, DataError
from vlm.evaluation.datasets import Item, OpenedDataset, ShardsDataset
from vlm.evaluation.exact import rank_range
from vlm.evaluation.model import Subject, subject_of_encoder
from vlm.inference import Encoder, ModalityMeans

__all__ = ["EmbeddedDataset", "embed_dataset", "embed_shards", "embed_texts", "modality_means"]

_CHUNK: Final = 64
_NOTE_SECONDS: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class EmbeddedDataset:
    """A dataset's embeddings and metadata on every rank, in order of its rows."""

    source: OpenedDataset
    """For the images themselves, which only the report needs."""
    keys: list[str]
    captions: list[tuple[str, ...]]
    """Of each image, at least one."""
    metadata: list[dict[str, Any]]
    images: Float[Tensor, "sample dim"]
    texts: Float[Tensor, "text dim"]
    """Of all captions of the first image, then of the second, …"""
    text_images: Int64[Tensor, " text"]
    """The image that a caption is of."""

    @property
    def first_texts(self) -> Float[Tensor, "sample dim"]:
        """The first caption of each image."""
        counts = torch.tensor([len(texts) for texts in self.captions])
        return self.texts[counts.cumsum(dim=0) - counts]

    def values(self, field: str) -> list[str]:
        """A metadata field of every row, as text.

        Raises:
            DataError: If a row lacks the field.
        """
        for key, metadata in zip(self.keys, self.metadata, strict=True):
            if field not in metadata:
                known = ", ".join(sorted(metadata)) or "none"
                message = (
                    f"{self.source.location}: sample {key!r} has no {field!r} in its metadata; "
                    f"it has: {known}"
                )
                raise DataError(message)
        return [str(metadata[field]) for metadata in self.metadata]

    def groups(self, field: str | None) -> Int64[Tensor, " sample"]:
        """A number a distinct value of a metadata field, by first appearance; none: every row one.

        Raises:
            DataError: If a row lacks the field.
        """
        if field is None:
            return torch.arange(len(self.keys))
        numbers: dict[str, int] = {}
        values = self.values(field)
        for value in values:
            numbers.setdefault(value, len(numbers))
        return torch.tensor([numbers[value] for value in values])


def embed_dataset(
    subject: Subject,
    dataset: OpenedDataset,
    world: World | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> EmbeddedDataset:
    """Embed every image and caption of a dataset.

    Args:
        subject: The model.
        dataset: The rows.
        world: The ranks that share the work; all get all rows.
        say: Told a line now and then on the first rank.

    Raises:
        DataError: If the dataset is empty, or an image cannot be read.
        BundleError: If the model gives embeddings that are no numbers.
    """
    if dataset.count == 0:
        message = f"{dataset.location}: there is nothing to evaluate on, 0 samples"
        raise DataError(message)
    world = world or World()
    images, texts, notes = [], [], []
    began = noted = time.monotonic()
    starts = rank_range(dataset.count, world, at_once=_CHUNK)
    for start in starts:
        items = list(dataset.read(start, min(start + _CHUNK, dataset.count)))
        images.append(subject.encode_images([_decoded(subject, dataset, i) for i in items]))
        texts.append(subject.encode_texts([text for item in items for text in item.texts]))
        notes += [[item.key, list(item.texts), item.metadata] for item in items]
        if time.monotonic() - noted > _NOTE_SECONDS:
            noted = time.monotonic()
            rate = len(notes) / (noted - began)
            left = (len(starts) * _CHUNK - len(notes)) / rate
            say(f"{dataset.location}: {len(notes)} pairs, {rate:.0f} pairs/s, {left:.0f} s to go")
    gathered = gather_bytes(json.dumps(notes).encode(), world)
    keys, captions, metadata = zip(
        *(note for part in gathered for note in json.loads(part)), strict=True
    )
    counts = torch.tensor([len(found) for found in captions])
    data = EmbeddedDataset(
        source=dataset,
        keys=list(keys),
        captions=[tuple(found) for found in captions],
        metadata=list(metadata),
        images=_gathered(images, subject.dim, world),
        texts=_gathered(texts, subject.dim, world),
        text_images=torch.arange(len(counts)).repeat_interleave(counts),
    )
    _check_finite(subject, data)
    return data


def embed_texts(
    subject: Subject, texts: Sequence[str], world: World | None = None
) -> Float[Tensor, "text dim"]:
    """Unit rows of texts, e.g. of the prompts of classes, on every rank.

    Raises:
        BundleError: If the model gives embeddings that are no numbers.
    """
    world = world or World()
    parts = [
        subject.encode_texts(texts[start : start + _CHUNK])
        for start in rank_range(len(texts), world, at_once=_CHUNK)
    ]
    rows = _gathered(parts, subject.dim, world)
    _refuse(subject, "prompts", rows)
    return rows


def embed_shards(
    encoder: Encoder, location: Path | str, *, max_pairs: int | None = None
) -> EmbeddedDataset:
    """Embed a dataset of shards with an encoder in this process alone; see `embed_dataset`.

    With `max_pairs`, the pairs with the lowest sample ids.
    """
    opened = ShardsDataset(location=str(location), max_pairs=max_pairs).open()
    try:
        return embed_dataset(subject_of_encoder(encoder), opened)
    finally:
        opened.close()


def modality_means(
    encoder: Encoder, locations: Sequence[Path | str], *, max_pairs: int
) -> ModalityMeans:
    """Mean image and mean caption embedding over (up to `max_pairs` of) one or more datasets."""
    share = -(-max_pairs // len(locations))
    parts = [embed_shards(encoder, location, max_pairs=share) for location in locations]
    return ModalityMeans(
        image=torch.cat([part.images for part in parts]).double().mean(dim=0).tolist(),
        text=torch.cat([part.texts for part in parts]).double().mean(dim=0).tolist(),
        num_pairs=sum(len(part.keys) for part in parts),
    )


def _gathered(parts: list[np.ndarray], dim: int, world: World) -> Float[Tensor, "row dim"]:
    own = np.concatenate([np.empty((0, dim), np.float32), *parts])
    return gather_uneven_rows(torch.from_numpy(own), world)


def _decoded(subject: Subject, dataset: OpenedDataset, item: Item) -> Any:
    try:
        return subject.decode(item.image)
    except DataError as error:
        message = f"{dataset.location}: sample {item.key!r}: {error}"
        raise DataError(message) from error


def _check_finite(subject: Subject, data: EmbeddedDataset) -> None:
    _refuse(subject, "images", data.images)
    _refuse(subject, "captions", data.texts)


def _refuse(subject: Subject, modality: str, rows: Float[Tensor, "row dim"]) -> None:
    bad = int((~torch.isfinite(rows).all(dim=1)).sum())
    if bad:
        message = (
            f"model {subject.name!r}: the embeddings of {bad} of {len(rows)} {modality} "
            f"are not finite numbers. The training diverged; train with a lower optim.lr"
        )
        raise BundleError(message)
