"""What the model gets right and wrong, with thumbnails."""

import base64
import io
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from vlm.evaluation.embed import EmbeddedDataset
from vlm.evaluation.ranks import top_matches
from vlm.evaluation.tasks import Outcome, Result
from vlm.preprocess import decode_picture

__all__ = [
    "Change",
    "Mistake",
    "Query",
    "Thumbnail",
    "caption_examples",
    "changes",
    "mistakes",
    "queries",
]

_EXAMPLES: Final = 8
_HITS: Final = 5
_THUMBNAIL_PIXELS: Final = 96


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small image within the page."""

    source: str
    """A data URI."""
    label: str
    """Its caption."""
    right: bool


@dataclass(frozen=True, kw_only=True)
class Query:
    """A caption, the rank of its best image from 1, and the images found first."""

    text: str
    rank: int
    hits: list[Thumbnail]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """An image, and the first image of the class it was taken for, if there is one."""

    image: Thumbnail
    taken_for: Thumbnail | None
    margin: float
    """Cosine of the predicted class less that of the true one."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """An image, the change asked for, and what was found."""

    image: Thumbnail
    asked: str
    hits: list[Thumbnail]


def queries(
    data: EmbeddedDataset, outcome: Outcome[Result], group_field: str | None
) -> dict[str, list[Query]]:
    """Captions that find their images best and worst, with what they find first.

    The best are spread over the dataset, since many are found at once.
    """
    groups, ranks = data.groups(group_field), outcome.evidence["text_ranks"]
    found = (ranks == 0).nonzero().flatten()
    spread = torch.linspace(0, max(len(found) - 1, 0), min(_EXAMPLES, len(found))).long()
    worst = ranks.argsort(descending=True, stable=True)[:_EXAMPLES]
    kinds = {
        "found at once": found[spread].tolist(),
        "found last": [index for index in worst.tolist() if ranks[index] > 0],
    }
    return {
        kind: [_query(data, groups, ranks, index) for index in chosen]
        for kind, chosen in kinds.items()
        if chosen
    }


def mistakes(data: EmbeddedDataset, outcome: Outcome[Result]) -> list[Mistake]:
    """The images that are taken for another class most surely, the surest first."""
    labels, predicted = outcome.evidence["labels"], outcome.evidence["predicted"]
    margins = outcome.evidence["margins"]
    wrong = (predicted != labels).nonzero().flatten()
    surest = wrong[margins[wrong].argsort(descending=True, stable=True)][:_EXAMPLES]
    first = {label: index for index, label in reversed(list(enumerate(labels.tolist())))}
    found = []
    for index in surest.tolist():
        other = first.get(int(predicted[index]))
        found.append(
            Mistake(
                image=_thumbnail(data, index, right=True),
                taken_for=None if other is None else _thumbnail(data, other, right=False),
                margin=float(margins[index]),
            )
        )
    return found


def changes(
    data: EmbeddedDataset, outcome: Outcome[Result], words: list[tuple[str, str]]
) -> list[Change]:
    """Some changes asked of images, spread over all, and what was found."""
    rows, targets, hits = (outcome.evidence[name] for name in ("rows", "targets", "hits"))
    spread = torch.linspace(0, len(rows) - 1, min(_EXAMPLES, len(rows))).long().tolist()
    found = []
    for index in spread:
        source, target = words[int(outcome.evidence["change"][index])]
        wanted = data.captions[int(targets[index])][0].casefold()
        found.append(
            Change(
                image=_thumbnail(data, int(rows[index]), right=False),
                asked=f"{source} → {target}",
                hits=[
                    _thumbnail(data, hit, right=data.captions[hit][0].casefold() == wanted)
                    for hit in hits[index].tolist()
                ],
            )
        )
    return found


def caption_examples(data: EmbeddedDataset, rows: list[int]) -> list[Thumbnail]:
    """The images of some rows."""
    return [_thumbnail(data, row, right=False) for row in rows]


def _query(data: EmbeddedDataset, groups: Tensor, ranks: Tensor, index: int) -> Query:
    hits = top_matches(data.texts[index : index + 1], data.images, _HITS)[0]
    image = int(data.text_images[index])
    first = int((data.text_images == image).nonzero()[0])
    return Query(
        text=data.captions[image][index - first],
        rank=int(ranks[index]) + 1,
        hits=[
            _thumbnail(data, hit, right=bool(groups[hit] == groups[image])) for hit in hits.tolist()
        ],
    )


def _thumbnail(data: EmbeddedDataset, row: int, *, right: bool) -> Thumbnail:
    # Decoded as for the model, so that a person sees what it saw: upright, laid over white.
    image = decode_picture(data.source.item(row).image)
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    label = data.captions[row][0] if data.captions[row] else data.keys[row]
    return Thumbnail(source=source, label=label, right=right)
