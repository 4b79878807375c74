"""Models and datasets whose embeddings are chosen by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vlm.distributed import World
from vlm.evaluation import Subject
from vlm.evaluation.datasets import Item, OpenedDataset
from vlm.evaluation.embed import EmbeddedDataset
from vlm.evaluation.tasks import Context
from vlm.inference import ModalityMeans


def fake_subject(
    *,
    texts: dict[str, torch.Tensor] | None = None,
    means: ModalityMeans | None = None,
    captions: list[str] | None = None,
) -> Subject:
    """Embeds the texts it knows; writes captions by the number that an image consists of."""
    known = texts or {}

    def encode_texts(asked: Sequence[str]) -> np.ndarray:
        found: np.ndarray = torch.stack([known[text].float() for text in asked]).numpy()
        return found

    def caption(images: Sequence[Any]) -> list[str]:
        return [(captions or [])[int(image)] for image in images]

    def encode_images(images: Sequence[Any]) -> np.ndarray:
        raise NotImplementedError

    return Subject(
        name="fake",
        fingerprint="f" * 64,
        dim=len(next(iter(known.values()))) if known else 2,
        logit_scale=10.0,
        decode=lambda data: data,
        encode_images=encode_images,
        encode_texts=encode_texts,
        caption=None if captions is None else caption,
        means=means,
    )


def embedded(
    images: torch.Tensor,
    captions: Sequence[str | tuple[str, ...]],
    texts: torch.Tensor | None = None,
    metadata: list[dict[str, Any]] | None = None,
) -> EmbeddedDataset:
    """Rows with these embeddings; image i is the bytes of its number."""
    told = [(c,) if isinstance(c, str) else c for c in captions]
    keys = [f"s{i}" for i in range(len(told))]
    items = [Item(key=key, image=str(i).encode(), texts=told[i]) for i, key in enumerate(keys)]
    counts = torch.tensor([len(found) for found in told])
    rows = images.repeat_interleave(counts, dim=0) if texts is None else texts
    return EmbeddedDataset(
        source=OpenedDataset(
            location="made", count=len(keys), read=lambda start, stop: iter(items[start:stop])
        ),
        keys=keys,
        captions=list(told),
        metadata=metadata or [{} for _ in keys],
        images=F.normalize(images.float(), dim=1),
        texts=F.normalize(rows.float(), dim=1),
        text_images=torch.arange(len(keys)).repeat_interleave(counts),
    )


def context(subject: Subject | None = None, **datasets: EmbeddedDataset) -> Context:
    return Context(subject=subject or fake_subject(), datasets=datasets, world=World(), seed=0)
