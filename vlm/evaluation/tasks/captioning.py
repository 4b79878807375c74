"""Captions that a model writes, against those of people."""

import json
from typing import Final, Literal

import torch
from pydantic import Field

from vlm.config import Config
from vlm.distributed import gather_bytes
from vlm.errors import BundleError
from vlm.evaluation.bootstrap import Scores
from vlm.evaluation.caption_scores import bleu, cider, words_of
from vlm.evaluation.exact import exact_mean, rank_range
from vlm.evaluation.tasks.base import Context, Outcome, TaskConfig, TaskResult

__all__ = ["CaptionExample", "CaptioningResult", "CaptioningTask"]

_CHUNK: Final = 16
_EXAMPLES: Final = 8


class CaptionExample(Config):
    """What the model wrote about one image."""

    key: str
    row: int
    written: str
    reference: str
    cider: float


class CaptioningResult(TaskResult):
    """Likeness to the captions of people."""

    type: Literal["captioning"] = "captioning"
    cider: float = Field(ge=0)
    """CIDEr-D, 0 to 10."""
    bleu1: float = Field(ge=0, le=1)
    bleu4: float = Field(ge=0, le=1)
    exact_fraction: float = Field(ge=0, le=1)
    """Share that says word for word what a person said."""
    images: int
    best: list[CaptionExample] = []
    worst: list[CaptionExample] = []


class CaptioningTask(TaskConfig):
    """Let a model that captions, a CoCa, write about each image, by beam search."""

    type: Literal["captioning"] = "captioning"
    max_images: int | None = Field(None, ge=1)
    """The first so many; all where it is left out."""

    def measure(self, context: Context) -> Outcome[CaptioningResult]:
        """Write and score.

        Returns:
            The figures; there is no evidence.

        Raises:
            BundleError: If the model writes no captions.
        """
        data, subject, world = context.datasets[self.data], context.subject, context.world
        if subject.caption is None:
            message = (
                f"model {subject.name!r} writes no captions; leave the captioning tasks out, or "
                f"train one with model.type: coca"
            )
            raise BundleError(message)
        count = min(len(data.keys), self.max_images or len(data.keys))
        own: list[str] = []
        for start in rank_range(count, world, at_once=_CHUNK):
            items = data.source.read(start, min(start + _CHUNK, count))
            own += subject.caption([subject.decode(item.image) for item in items])
        gathered = gather_bytes(json.dumps(own).encode(), world)
        written = [caption for part in gathered for caption in json.loads(part)]
        candidates = [words_of(caption) for caption in written]
        references = [[words_of(text) for text in texts] for texts in data.captions[:count]]
        each, totals = cider(candidates, references), bleu(candidates, references)
        same = [float(words in known) for words, known in zip(candidates, references, strict=True)]
        examples = [
            CaptionExample(
                key=data.keys[row],
                row=row,
                written=written[row],
                reference=data.captions[row][0],
                cider=each[row],
            )
            for row in sorted(range(count), key=lambda row: (-each[row], row))
        ]
        result = CaptioningResult(
            data=self.data,
            cider=exact_mean(each),
            bleu1=totals[0],
            bleu4=totals[3],
            exact_fraction=exact_mean(same),
            images=count,
            best=examples[:_EXAMPLES],
            worst=examples[-_EXAMPLES:][::-1],
        )
        clusters = torch.arange(count)
        return Outcome(
            result=result,
            scores={
                "cider": Scores(values=torch.tensor(each).double(), clusters=clusters),
                "exact_fraction": Scores(values=torch.tensor(same).double(), clusters=clusters),
            },
        )
