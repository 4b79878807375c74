"""Plain text→image search with what a server may correct at query time: does it help or harm?"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.distributed import World
from vlm.evaluation.bootstrap import Scores
from vlm.evaluation.exact import exact_mean
from vlm.evaluation.ranks import top_matches
from vlm.evaluation.tasks.base import Context, Outcome, TaskConfig, TaskResult
from vlm.evaluation.tasks.centring import Origin, centred, means_for
from vlm.evaluation.tasks.ndcg import FIRST, ndcg, sizes
from vlm.inference import HUB_CANDIDATES, HUB_SHARPNESS, crowding

__all__ = ["CorrectedResult", "CorrectedTask", "top_without_hubs"]

_ROWS_AT_ONCE = 256


class CorrectedResult(TaskResult):
    """Fractions from 0 to 1: as embedded, centred, and without hubs."""

    type: Literal["corrected_retrieval"] = "corrected_retrieval"
    ndcg10: float = Field(ge=0, le=1)
    ndcg10_centred: float = Field(ge=0, le=1)
    ndcg10_without_hubs: float = Field(ge=0, le=1)
    recall1: float = Field(ge=0, le=1)
    recall1_centred: float = Field(ge=0, le=1)
    recall1_without_hubs: float = Field(ge=0, le=1)
    gain_centred: float = Field(ge=-1, le=1)
    """Mean of what centring adds to the NDCG of a query."""
    gain_without_hubs: float = Field(ge=-1, le=1)
    means: Origin
    """Where the means for centring come from."""
    bank: int
    """Captions that tell which images are hubs; they are not asked for."""
    queries: int
    gallery: int


class CorrectedTask(TaskConfig):
    """Find images by captions, plainly, with centred rows, and with QB-Norm.

    A server ranks images by a plain text as embedded, whatever it does elsewhere; this is to show
    what the others would change.
    """

    type: Literal["corrected_retrieval"] = "corrected_retrieval"
    group_field: str | None = None
    """Samples with equal values here are right answers for each other; none: only own pairs."""
    bank: int = Field(128, ge=1)
    """Captions that stand for what people ask, drawn by the seed; half of all at most."""

    def measure(self, context: Context) -> Outcome[CorrectedResult]:
        """Ask with all captions but the bank's.

        Returns:
            The figures; there is no evidence.
        """
        data, world = context.datasets[self.data], context.world
        groups = data.groups(self.group_field)
        generator = torch.Generator().manual_seed(context.seed)
        order = torch.randperm(len(groups), generator=generator)
        kept = min(self.bank, len(order) // 2)
        banked, asked = order[:kept], order[kept:].sort().values
        means = means_for(context.subject, data)
        images, texts = data.images.double(), data.first_texts.double()
        moved = centred(data.images, means.image), centred(data.first_texts, means.text)
        found = {
            "": top_matches(texts[asked], images, FIRST, world),
            "_centred": top_matches(moved[1][asked], moved[0], FIRST, world),
            "_without_hubs": top_without_hubs(texts[asked], images, texts[banked], world),
        }
        scores = {}
        for name, top in found.items():
            right = groups[top] == groups[asked, None]
            for figure, values in (
                (f"ndcg10{name}", ndcg(right, sizes(groups)[asked])),
                (f"recall1{name}", right[:, 0].double()),
            ):
                scores[figure] = Scores(values=values, clusters=groups[asked])
        for name in ("_centred", "_without_hubs"):
            gained = scores[f"ndcg10{name}"].values - scores["ndcg10"].values
            scores[f"gain{name}"] = Scores(values=gained, clusters=groups[asked])
        result = CorrectedResult(
            data=self.data,
            **{figure: exact_mean(score.values) for figure, score in scores.items()},
            means=means.origin,
            bank=kept,
            queries=len(asked),
            gallery=len(groups),
        )
        return Outcome(result=result, scores=scores)


def top_without_hubs(
    queries: Float[Tensor, "query dim"],
    gallery: Float[Tensor, "item dim"],
    bank: Float[Tensor, "banked dim"],
    world: World,
) -> Int64[Tensor, "query first"]:
    """The 10 best as a server finds them that is asked to reduce hubs.

    The 100 nearest are put into a new order, but only where the nearest is that of a query of the
    bank too.

    Source: QB-Norm with its dynamic inverted softmax, Bogolin et al. 2022 (arXiv:2112.12777).
    """
    nearest = top_matches(queries, gallery, HUB_CANDIDATES, world)  # [query candidate]
    if not len(bank):
        return nearest[:, :FIRST]
    hubs = top_matches(bank, gallery, 1, world).flatten()
    crowds = torch.from_numpy(crowding(gallery.numpy(), bank.numpy()))
    cosines = torch.cat(
        [
            torch.einsum("qd,qcd->qc", some, gallery[candidates])
            for some, candidates in zip(
                queries.split(_ROWS_AT_ONCE), nearest.split(_ROWS_AT_ONCE), strict=True
            )
        ]
    )
    scores = HUB_SHARPNESS * cosines - crowds[nearest]
    order = scores.sort(dim=1, descending=True, stable=True).indices
    applies = torch.isin(nearest[:, :1], hubs)
    return torch.where(applies, nearest.gather(1, order), nearest)[:, :FIRST]
