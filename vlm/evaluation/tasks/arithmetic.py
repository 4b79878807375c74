"""Arithmetic with both modalities: an image, plus a change told in words, finds another image."""

import re
from typing import Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.errors import DataError
from vlm.evaluation.bootstrap import Scores
from vlm.evaluation.embed import EmbeddedDataset, embed_texts
from vlm.evaluation.exact import exact_mean
from vlm.evaluation.ranks import top_matches
from vlm.evaluation.tasks.base import Context, Outcome, TaskConfig, TaskResult
from vlm.evaluation.tasks.centring import Origin, centred, means_for

__all__ = ["ArithmeticResult", "ArithmeticTask", "word_changes"]

_FIRST: Final = 5


class ArithmeticResult(TaskResult):
    """Fractions from 0 to 1."""

    type: Literal["arithmetic"] = "arithmetic"
    recall1: float = Field(ge=0, le=1)
    """Share of changes whose first image found has the caption that was asked for."""
    recall5: float = Field(ge=0, le=1)
    recall1_centred: float = Field(ge=0, le=1)
    recall5_centred: float = Field(ge=0, le=1)
    image_alone1: float = Field(ge=0, le=1)
    """The same for the image without its change: what likeness by itself finds."""
    means: Origin
    queries: int
    gallery: int


class ArithmeticTask(TaskConfig):
    """For each image whose caption has a change's first word, find the caption with the second.

    The query is norm(I + strength * (T_target - T_source)) of unit rows, as in SIMAT (Couairon,
    Douze, Cord & Schwenk 2022, arXiv:2112.03162); T are the embeddings of the two words in the
    template. Its own image is not among the answers. Changes that no other image shows are left
    out.
    """

    type: Literal["arithmetic"] = "arithmetic"
    changes: list[tuple[str, str]] = Field(min_length=1)
    """Words, or groups of words, as they stand in captions."""
    template: str = "{}"
    strength: float = Field(1.0, gt=0)

    def measure(self, context: Context) -> Outcome[ArithmeticResult]:
        """Search with every change, without and with centring.

        Returns:
            The figures; evidence is `rows`, `targets` (a row with the caption asked for), `hits`
            (the rows found first) and `change` (the number of the change) of each query.

        Raises:
            DataError: If no caption of the dataset has a partner.
        """
        data = context.datasets[self.data]
        found = word_changes(data, self.changes)
        if not found:
            message = (
                f"{data.source.location}: no two captions differ by one of the changes "
                f"{', '.join(f'{a} → {b}' for a, b in self.changes)}"
            )
            raise DataError(message)
        rows, targets, change = (torch.tensor(column) for column in zip(*found, strict=True))
        words = [self.template.replace("{}", word) for pair in self.changes for word in pair]
        texts = embed_texts(context.subject, words, context.world)
        means = means_for(context.subject, data)
        captions = _caption_numbers(data)
        wanted = captions[targets]
        moved = {
            "": (data.images.double(), texts.double()),
            "_centred": (centred(data.images, means.image), centred(texts, means.text)),
        }
        hits = {}
        for name, (images, told) in moved.items():
            source, target = told[0::2][change], told[1::2][change]
            queries = F.normalize(images[rows] + self.strength * (target - source), dim=1)
            hits[name] = _others(queries, images, rows, context)
        hits["alone"] = _others(data.images[rows], data.images, rows, context)
        right = {name: captions[top] == wanted[:, None] for name, top in hits.items()}
        first = {name: r[:, 0].double() for name, r in right.items()}
        within = {name: r.any(dim=1).double() for name, r in right.items()}
        result = ArithmeticResult(
            data=self.data,
            recall1=exact_mean(first[""]),
            recall5=exact_mean(within[""]),
            recall1_centred=exact_mean(first["_centred"]),
            recall5_centred=exact_mean(within["_centred"]),
            image_alone1=exact_mean(first["alone"]),
            means=means.origin,
            queries=len(rows),
            gallery=len(data.images) - 1,
        )
        return Outcome(
            result=result,
            scores={
                "recall1": Scores(values=first[""], clusters=rows),
                "recall5": Scores(values=within[""], clusters=rows),
                "recall1_centred": Scores(values=first["_centred"], clusters=rows),
            },
            evidence={"rows": rows, "targets": targets, "hits": hits[""], "change": change},
        )


def word_changes(
    data: EmbeddedDataset, changes: list[tuple[str, str]]
) -> list[tuple[int, int, int]]:
    """Each row that a change applies to, the first row with the changed caption, and the change."""
    rows: dict[str, int] = {}
    captions = [texts[0].casefold() for texts in data.captions]
    for row, caption in enumerate(captions):
        rows.setdefault(caption, row)
    found = []
    for number, (source, target) in enumerate(changes):
        pattern = re.compile(rf"\b{re.escape(source.casefold())}\b")
        for row, caption in enumerate(captions):
            changed = pattern.sub(target.casefold().replace("\\", r"\\"), caption)
            if changed != caption and changed in rows:
                found.append((row, rows[changed], number))
    return found


def _caption_numbers(data: EmbeddedDataset) -> Tensor:
    numbers: dict[str, int] = {}
    return torch.tensor(
        [numbers.setdefault(texts[0].casefold(), len(numbers)) for texts in data.captions]
    )


def _others(
    queries: Float[Tensor, "query dim"],
    images: Float[Tensor, "row dim"],
    rows: Int64[Tensor, " query"],
    context: Context,
) -> Int64[Tensor, "query place"]:
    """The rows found first, without the query's own."""
    top = top_matches(queries, images, _FIRST + 1, context.world)
    kept = top != rows[:, None]
    # Where the own row is not among them, the last one is dropped.
    kept &= kept.cumsum(dim=1) <= top.shape[1] - 1
    return top[kept].reshape(len(top), -1)
