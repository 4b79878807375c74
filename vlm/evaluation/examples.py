"""What the model gets right and wrong, with thumbnails."""

import base64
import io
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.data.samples import Sample
from vlm.evaluation.ranks import best_positive_ranks, top_matches
from vlm.evaluation.run import EmbeddedDataset
from vlm.preprocess import decode_picture

__all__ = ["Mistake", "Query", "Thumbnail", "mistakes", "queries"]

_EXAMPLES = 8
_HITS = 5
_THUMBNAIL_PIXELS = 96


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
    """An image, and the first image of the class it was taken for."""

    image: Thumbnail
    taken_for: Thumbnail
    margin: float
    """Cosine of the predicted class less that of the true one."""


def queries(data: EmbeddedDataset, group_field: str | None) -> dict[str, list[Query]]:
    """Captions that find their images best and worst, with what they find first.

    The best are spread over the dataset, since many are found at once.
    """
    groups = data.groups(group_field)
    ranks = best_positive_ranks(data.texts, data.images, groups, groups)
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


def mistakes(
    data: EmbeddedDataset, class_rows: Float[Tensor, "class dim"], class_field: str
) -> list[Mistake]:
    """The images that are taken for another class most surely, the surest first."""
    labels = data.groups(class_field)
    predicted = top_matches(data.images, class_rows, 1).flatten()
    margins = (data.images * (class_rows[predicted] - class_rows[labels])).sum(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    surest = wrong[margins[wrong].argsort(descending=True, stable=True)][:_EXAMPLES]
    first = {label: index for index, label in reversed(list(enumerate(labels.tolist())))}
    return [
        Mistake(
            image=_thumbnail(data.samples[index], right=True),
            taken_for=_thumbnail(data.samples[first[int(predicted[index])]], right=False),
            margin=float(margins[index]),
        )
        for index in surest.tolist()
    ]


def _query(
    data: EmbeddedDataset,
    groups: Int64[Tensor, " sample"],
    ranks: Int64[Tensor, " sample"],
    index: int,
) -> Query:
    hits = top_matches(data.texts[index : index + 1], data.images, _HITS)[0]
    return Query(
        text=data.samples[index].text,
        rank=int(ranks[index]) + 1,
        hits=[
            _thumbnail(data.samples[hit], right=bool(groups[hit] == groups[index]))
            for hit in hits.tolist()
        ],
    )


def _thumbnail(sample: Sample, *, right: bool) -> Thumbnail:
    # Decoded as for the model, so that a person sees what it saw: upright, laid over white.
    image = decode_picture(sample.image)
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(source=source, label=sample.text, right=right)
