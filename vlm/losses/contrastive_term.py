"""What all contrastive terms are asked: what rows of one group are, and what a teacher masks."""

from typing import Literal

from pydantic import Field

from vlm.config import Config
from vlm.losses.contrastive import SameGroup
from vlm.losses.pairs import Similar
from vlm.losses.weights import WeightedTerm
from vlm.types import Features

__all__ = ["ContrastiveTerm", "FalseNegatives"]


class FalseNegatives(Config):
    """Which pairs a frozen teacher takes out of the negatives.

    Source: MultiCSR's mask at 0.95, there for captions.
    """

    by: Literal["text", "image", "either"] = "text"
    """The teacher's embeddings that are compared: of captions, of images, or any of both."""
    cosine: float = Field(0.95, gt=-1, lt=1)
    """Pairs above this are no negatives."""


class ContrastiveTerm(WeightedTerm):
    """Base of the terms that push rows from their negatives."""

    same_group: SameGroup = "positive"
    """What other samples of the same group are to a sample."""
    false_negatives: FalseNegatives | None = None
    """A mask by a teacher's cosines, beside the groups; needs the `teacher` section."""

    @property
    def needs_teacher(self) -> bool:
        return self.false_negatives is not None

    def similar(self, features: Features) -> tuple[Similar, ...]:
        """The pairs of the batch that the teacher masks."""
        if self.false_negatives is None:
            return ()
        image, text, _ = features.require_teacher(f"{self.__class__.__name__}.false_negatives")
        by = {"image": (image,), "text": (text,), "either": (image, text)}
        return tuple(
            Similar(rows=rows, columns=rows, above=self.false_negatives.cosine)
            for rows in by[self.false_negatives.by]
        )
