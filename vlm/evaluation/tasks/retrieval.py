"""Retrieval between modalities, with many captions an image and many images a caption."""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.evaluation.bootstrap import Scores
from vlm.evaluation.exact import exact_mean
from vlm.evaluation.ranks import best_positive_ranks, paired_ranks
from vlm.evaluation.tasks.base import Context, Outcome, TaskConfig, TaskResult

__all__ = ["Recall", "RetrievalResult", "RetrievalTask", "recall"]

_KS = (1, 5, 10)


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


class RetrievalResult(TaskResult):
    """Both directions."""

    type: Literal["retrieval"] = "retrieval"
    image_to_text: Recall
    text_to_image: Recall


class RetrievalTask(TaskConfig):
    """Find captions by images and images by captions; all captions of an image are right."""

    type: Literal["retrieval"] = "retrieval"
    group_field: str | None = None
    """Samples with equal values here are positives of each other; none: only own pairs."""

    def measure(self, context: Context) -> Outcome[RetrievalResult]:
        """Rank both ways.

        Returns:
            The figures; evidence is `image_ranks` and `text_ranks`, from 0.
        """
        data = context.datasets[self.data]
        groups = data.groups(self.group_field)
        text_groups = groups[data.text_images]
        image_ranks, text_ranks = paired_ranks(
            data.images, data.texts, groups, text_groups, context.world
        )
        result = RetrievalResult(
            data=self.data,
            image_to_text=_recall(image_ranks, groups, text_groups),
            text_to_image=_recall(text_ranks, text_groups, groups),
        )
        scores = {}
        for direction, ranks, clusters in (
            ("image_to_text", image_ranks, groups),
            ("text_to_image", text_ranks, text_groups),
        ):
            for k in _KS:
                scores[f"{direction}.recall{k}"] = Scores(
                    values=(ranks < k).double(), clusters=clusters
                )
            scores[f"{direction}.mrr"] = Scores(values=1 / (ranks.double() + 1), clusters=clusters)
        evidence = {"image_ranks": image_ranks, "text_ranks": text_ranks}
        return Outcome(result=result, scores=scores, evidence=evidence)


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
    ranks = best_positive_ranks(queries, gallery, query_groups, gallery_groups)
    return _recall(ranks, query_groups, gallery_groups)


def _recall(
    ranks: Int64[Tensor, " query"],
    query_groups: Int64[Tensor, " query"],
    gallery_groups: Int64[Tensor, " item"],
) -> Recall:
    _, inverse = torch.unique(torch.cat([query_groups, gallery_groups]), return_inverse=True)
    sizes = torch.bincount(inverse[len(ranks) :], minlength=int(inverse.max()) + 1)
    positives = sizes[inverse[: len(ranks)]].double()
    return Recall(
        recall1=exact_mean((ranks < 1).double()),
        recall5=exact_mean((ranks < 5).double()),
        recall10=exact_mean((ranks < 10).double()),
        median_rank=_median(ranks.double()) + 1,
        mrr=exact_mean(1 / (ranks.double() + 1)),
        queries=len(ranks),
        gallery=len(gallery_groups),
        chance=exact_mean(positives / len(gallery_groups)),
    )


def _median(values: Float[Tensor, " query"]) -> float:
    """The usual median; torch's own takes the lower of the two middle values."""
    ordered, middle = values.sort().values, len(values) // 2
    return float(ordered[middle - 1 + len(values) % 2] + ordered[middle]) / 2
