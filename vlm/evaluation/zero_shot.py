"""Zero-shot classification accuracy."""

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.evaluation.ranks import best_positive_ranks

__all__ = ["ZeroShotResult", "zero_shot_accuracy"]


class ZeroShotResult(Config):
    """Fractions from 0 to 1."""

    top1: float = Field(ge=0, le=1)
    top5: float = Field(ge=0, le=1)
    top10: float = Field(ge=0, le=1)
    mean_per_class: float = Field(ge=0, le=1)
    """Top-1 accuracy averaged over classes that have samples."""
    classes: int
    samples: int
    chance: float
    """Top-1 of a blind guess, 1 / classes."""


def zero_shot_accuracy(
    images: Float[Tensor, "sample dim"],
    class_rows: Float[Tensor, "class dim"],
    labels: Int64[Tensor, " sample"],
) -> ZeroShotResult:
    """Accuracy of the nearest class row; among equal similarities the lower class wins.

    Args:
        images: Unit rows.
        class_rows: Unit rows, one a class.
        labels: Number of each image's class.

    Raises:
        ValueError: If there is no image, or a label is not a class.
    """
    if len(images) == 0:
        message = "zero-shot accuracy needs at least one image"
        raise ValueError(message)
    ranks = best_positive_ranks(images, class_rows, labels, torch.arange(len(class_rows)))
    correct = (ranks == 0).double()
    sums = torch.zeros(len(class_rows), dtype=torch.float64).index_add_(0, labels, correct)
    counts = torch.bincount(labels, minlength=len(class_rows))
    present = counts > 0
    return ZeroShotResult(
        top1=float(correct.mean()),
        top5=float((ranks < 5).double().mean()),
        top10=float((ranks < 10).double().mean()),
        mean_per_class=float((sums[present] / counts[present]).mean()),
        classes=len(class_rows),
        samples=len(images),
        chance=1 / len(class_rows),
    )
