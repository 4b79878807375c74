"""Search in one gallery of images and texts together, where a modality gap does its harm."""

from typing import Literal

import torch
from pydantic import Field

from vlm.evaluation.bootstrap import Scores
from vlm.evaluation.exact import exact_mean
from vlm.evaluation.ranks import top_matches
from vlm.evaluation.tasks.base import Context, Outcome, TaskConfig, TaskResult
from vlm.evaluation.tasks.centring import Origin, centred, means_for
from vlm.evaluation.tasks.ndcg import FIRST, ndcg, sizes

__all__ = ["MixedResult", "MixedTask"]


class MixedResult(TaskResult):
    """Fractions from 0 to 1; without and with centring."""

    type: Literal["mixed_retrieval"] = "mixed_retrieval"
    ndcg10: float = Field(ge=0, le=1)
    ndcg10_centred: float = Field(ge=0, le=1)
    gain: float = Field(ge=-1, le=1)
    """Mean of what centring adds to the NDCG of a query."""
    other_modality: float = Field(ge=0, le=1)
    """Share of the first 10 found that are not of the query's own modality."""
    other_modality_centred: float = Field(ge=0, le=1)
    other_modality_even: float
    """What that share is for a model that does not see the modality."""
    means: Origin
    """Where the means for centring come from."""
    queries: int
    gallery: int


class MixedTask(TaskConfig):
    """Each sample is in the gallery as its image or as its first caption, by the toss of a coin.

    The query is what is left of the pair, and what it shall find is of the other modality: a gap
    lets all items of its own come first. The idea is that of MixBench (arXiv:2507.19054); its own
    datasets hold documents of both modalities, which pairs alone do not.
    """

    type: Literal["mixed_retrieval"] = "mixed_retrieval"
    group_field: str | None = None
    """Samples with equal values here are right answers for each other; none: only own pairs."""

    def measure(self, context: Context) -> Outcome[MixedResult]:
        """Search without and with centring.

        Returns:
            The figures; there is no evidence.
        """
        data = context.datasets[self.data]
        groups = data.groups(self.group_field)
        generator = torch.Generator().manual_seed(context.seed)
        is_image = torch.rand(len(groups), generator=generator) < 0.5
        means = means_for(context.subject, data)
        found, others = {}, {}
        for name, (images, texts) in {
            "": (data.images.double(), data.first_texts.double()),
            "_centred": (
                centred(data.images, means.image),
                centred(data.first_texts, means.text),
            ),
        }.items():
            gallery = torch.where(is_image[:, None], images, texts)
            queries = torch.where(is_image[:, None], texts, images)
            top = top_matches(queries, gallery, FIRST, context.world)
            found[name] = ndcg(groups[top] == groups[:, None], sizes(groups))
            # A query of a sample in the gallery as an image is a text.
            others[name] = (is_image[top] == is_image[:, None]).double().mean(dim=1)
        scores = {
            figure: Scores(values=values, clusters=groups)
            for figure, values in (
                ("ndcg10", found[""]),
                ("ndcg10_centred", found["_centred"]),
                ("gain", found["_centred"] - found[""]),
            )
        }
        share = is_image.double().mean()
        result = MixedResult(
            data=self.data,
            **{figure: exact_mean(score.values) for figure, score in scores.items()},
            other_modality=exact_mean(others[""]),
            other_modality_centred=exact_mean(others["_centred"]),
            other_modality_even=float(share * share + (1 - share) * (1 - share)),
            means=means.origin,
            queries=len(groups),
            gallery=len(groups),
        )
        return Outcome(result=result, scores=scores)
