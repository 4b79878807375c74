"""Retrieval between modalities, with many captions an image and many images a caption."""

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.evaluation.ranks import best_positive_ranks

__all__ = ["Recall", "RetrievalResult", "recall"]


class Recall(Config):
    """One direction. A query counts if at least one of its positives is among the first k."""

    recall1: float = Field(ge=0, le=1)
    recall5: float = Field(ge=0, le=1)
    recall10: float = Field(ge=0, le=1)
    median_rank: float = Field(ge=1)
    """Of the first positive, counted from 1; between the two middle ranks of an even count."""
    mrr: float = Field(ge=0, le=1)
    """Mean of 1 / rank."""
    queries: int
    gallery: int
    chance: float
    """Expected recall@1 of a random order."""


class RetrievalResult(Config):
    """Both directions."""

    image_to_text: Recall
    text_to_image: Recall


def recall(
    queries: Float[Tensor, "query dim"],
    gallery: Float[Tensor, "item dim"],
    query_groups: Int64[Tensor, " query"],
    gallery_groups: Int64[Tensor, " item"],
) -> Recall:
    """Recall@k by CLIP_benchmark's definition; equal groups are positives.

    Raises:
        ValueError: If there is no query, or one has no positive.
    """
    if len(queries) == 0:
        message = "retrieval needs at least one query"
        raise ValueError(message)
    ranks = best_positive_ranks(queries, gallery, query_groups, gallery_groups).double()
    _, inverse = torch.unique(torch.cat([query_groups, gallery_groups]), return_inverse=True)
    sizes = torch.bincount(inverse[len(queries) :], minlength=int(inverse.max()) + 1)
    positives = sizes[inverse[: len(queries)]].double()
    return Recall(
        recall1=float((ranks < 1).double().mean()),
        recall5=float((ranks < 5).double().mean()),
        recall10=float((ranks < 10).double().mean()),
        median_rank=_median(ranks) + 1,
        mrr=float((1 / (ranks + 1)).mean()),
        queries=len(queries),
        gallery=len(gallery),
        chance=float((positives / len(gallery)).mean()),
    )


def _median(values: Float[Tensor, " query"]) -> float:
    """The usual median; torch's own takes the lower of the two middle values."""
    ordered, middle = values.sort().values, len(values) // 2
    return float(ordered[middle - 1 + len(values) % 2] + ordered[middle]) / 2
