"""Classification from a few examples of each class, in episodes."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.errors import DataError
from vlm.evaluation.bootstrap import Scores
from vlm.evaluation.embed import EmbeddedDataset
from vlm.evaluation.exact import exact_mean, over_rows
from vlm.evaluation.probes import (
    aligned_prototypes,
    fit_linear_probe,
    nearest_prototype,
    prototypes,
    standardised,
)
from vlm.evaluation.tasks.base import Context, Outcome, TaskConfig, TaskResult

__all__ = ["FewShotFigure", "FewShotResult", "FewShotTask"]

Method = Literal["prototypes", "linear_probe", "opta"]
Pools = list[tuple[Tensor, Tensor]]
"""Rows of the examples and of the queries of each class, as many as it has."""


class FewShotFigure(Config):
    """One way to learn from so many examples."""

    method: Method
    shots: int
    accuracy: float = Field(ge=0, le=1)


class FewShotResult(TaskResult):
    """Mean accuracy over all queries of all episodes."""

    type: Literal["few_shot"] = "few_shot"
    figures: list[FewShotFigure]
    ways: int
    episodes: int
    queries: int
    """Of one episode."""
    eligible_classes: int
    chance: float


class FewShotTask(TaskConfig):
    """Draw some classes, learn each from `shots` of its images, and classify others of its images.

    `prototypes`: the class with the nearest mean. `linear_probe`: logistic regression.
    `opta`: the transductive alignment of BECLR (arXiv:2402.02444): it sees all queries of an
    episode at once and takes every class to be asked about equally often, so it is for offline
    use alone.
    """

    type: Literal["few_shot"] = "few_shot"
    class_field: str | None = None
    """Key of the metadata that tells a sample's class; none: what the dataset knows itself."""
    support: str | None = None
    """Name of another dataset, which examples come from; none: from `data` itself."""
    shots: list[int] = Field([1, 5], min_length=1)
    ways: int = Field(20, ge=2)
    """Classes of an episode, all of them where there are fewer."""
    queries: int = Field(1, ge=1)
    """Of each class."""
    episodes: int = Field(50, ge=1)
    methods: list[Method] = Field(["prototypes", "linear_probe"], min_length=1)
    regularisation: float = Field(1.0, gt=0)
    """C of the linear probe: the weight of the loss against half the squared weights."""

    def measure(self, context: Context) -> Outcome[FewShotResult]:
        """Run the episodes, which the ranks share.

        Returns:
            The figures; there is no evidence.

        Raises:
            DataError: If fewer than two classes have enough images.
        """
        data = context.datasets[self.data]
        support = context.datasets[self.support] if self.support else data
        pools = self._pools(data, support)
        ways = min(self.ways, len(pools))

        def episode(start: int, _: int) -> Bool[Tensor, "1 shot_method_query"]:
            drawn = _draw(pools, ways, max(self.shots), self.queries, [context.seed, start])
            return self._correct(*(support.images[drawn[0]], data.images[drawn[1]])).flatten()[None]

        correct = over_rows(self.episodes, context.world, episode, at_once=1).double()
        correct = correct.reshape(self.episodes, len(self.shots), len(self.methods), -1)
        clusters = torch.arange(self.episodes).repeat_interleave(ways * self.queries)
        figures, scores = [], {}
        for s, shots in enumerate(self.shots):
            for m, method in enumerate(self.methods):
                values = correct[:, s, m].flatten()
                figures.append(
                    FewShotFigure(method=method, shots=shots, accuracy=exact_mean(values))
                )
                scores[f"{method}@{shots}"] = Scores(values=values, clusters=clusters)
        result = FewShotResult(
            data=self.data,
            figures=figures,
            ways=ways,
            episodes=self.episodes,
            queries=ways * self.queries,
            eligible_classes=len(pools),
            chance=1 / ways,
        )
        return Outcome(result=result, scores=scores)

    def _pools(self, data: EmbeddedDataset, support: EmbeddedDataset) -> Pools:
        """Rows of examples and of queries of every class that has enough of both."""
        own = data.source.classes
        field = self.class_field or (own.class_field if own else None)
        if field is None:
            message = (
                f"{data.source.location}: nothing tells the class of a sample; set class_field"
            )
            raise DataError(message)
        asked = _by_value(data, field)
        examples = asked if support is data else _by_value(support, field)
        most = max(self.shots)
        need = most + self.queries if support is data else most
        pools = [
            (examples[value], rows)
            for value, rows in asked.items()
            if value in examples and len(examples[value]) >= need and len(rows) >= self.queries
        ]
        if len(pools) < 2:
            message = (
                f"{data.source.location}: {len(pools)} of {len(asked)} classes have the "
                f"{most} examples and {self.queries} queries that shots={self.shots} asks for; at "
                f"least 2 are needed. Lower shots or queries, or name another dataset as support"
            )
            raise DataError(message)
        return pools

    def _correct(
        self,
        support: Float[Tensor, "way example dim"],
        queries: Float[Tensor, "way query dim"],
    ) -> Bool[Tensor, "shot method asked"]:
        """Whether each query is classified right, by number of examples and by method."""
        labels = torch.arange(len(queries)).repeat_interleave(queries.shape[1])
        asked = queries.flatten(0, 1).double()
        return torch.stack(
            [
                torch.stack(
                    [
                        self._classify(method, support[:, :shots].double(), asked) == labels
                        for method in self.methods
                    ]
                )
                for shots in self.shots
            ]
        )

    def _classify(
        self,
        method: Method,
        support: Float[Tensor, "way example dim"],
        queries: Float[Tensor, "query dim"],
    ) -> Int64[Tensor, " query"]:
        ways, shots = support.shape[:2]
        if method == "prototypes":
            return nearest_prototype(prototypes(support), queries)
        if method == "linear_probe":
            labels = torch.arange(ways).repeat_interleave(shots)
            probe = fit_linear_probe(support.flatten(0, 1), labels, ways, c=self.regularisation)
            return probe(queries).argmax(dim=1)
        means = standardised(support).mean(dim=1)
        moved = aligned_prototypes(means, standardised(queries), shots=shots)
        probe = fit_linear_probe(moved, torch.arange(ways), ways, c=self.regularisation)
        return probe(standardised(queries)).argmax(dim=1)


def _by_value(data: EmbeddedDataset, field: str) -> dict[str, Tensor]:
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(data.values(field)):
        rows.setdefault(value, []).append(row)
    return {value: torch.tensor(found) for value, found in rows.items()}


def _draw(
    pools: Pools,
    ways: int,
    shots: int,
    queries: int,
    seed: list[int],
) -> tuple[Int64[Tensor, "way example"], Int64[Tensor, "way query"]]:
    """Rows of one episode; a pool that is both examples and queries is split."""
    generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
    chosen = torch.randperm(len(pools), generator=generator)[:ways].tolist()
    examples, asked = [], []
    for number in chosen:
        support, own = pools[number]
        order = support[torch.randperm(len(support), generator=generator)]
        examples.append(order[:shots])
        if support is own:
            asked.append(order[shots : shots + queries])
        else:
            asked.append(own[torch.randperm(len(own), generator=generator)[:queries]])
    return torch.stack(examples), torch.stack(asked)
