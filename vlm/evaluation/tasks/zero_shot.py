"""Zero-shot classification: accuracy, calibration, and which classes are taken for which."""

from typing import Any, Final, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, field_validator
from torch import Tensor

from vlm.config import Config
from vlm.distributed import World
from vlm.errors import DataError
from vlm.evaluation.bootstrap import Scores
from vlm.evaluation.embed import EmbeddedDataset, embed_texts
from vlm.evaluation.exact import UNIT, exact_mean, over_rows, whole_rows
from vlm.evaluation.names import ClassSet, TemplateSet, class_names, templates
from vlm.evaluation.ranks import best_positive_ranks, top_matches
from vlm.evaluation.tasks.base import Context, Outcome, TaskConfig, TaskResult
from vlm.inference import class_embeddings

__all__ = ["Confusion", "ReliabilityBin", "ZeroShotResult", "ZeroShotTask", "zero_shot_accuracy"]

_BINS: Final = 15
_CONFUSIONS: Final = 12
_MAX_TAGS: Final = 6


class ReliabilityBin(Config):
    """Predictions of about one confidence."""

    count: int
    confidence: float
    """Their mean probability."""
    accuracy: float


class Confusion(Config):
    """A class that is taken for another."""

    true: str
    predicted: str
    count: int
    of: int
    """Images of the true class."""


class ZeroShotResult(TaskResult):
    """Fractions from 0 to 1."""

    type: Literal["zero_shot"] = "zero_shot"
    top1: float = Field(ge=0, le=1)
    top5: float = Field(ge=0, le=1)
    top10: float = Field(ge=0, le=1)
    mean_per_class: float = Field(ge=0, le=1)
    """Top-1 accuracy averaged over classes that have samples."""
    calibration_error: float = Field(ge=0, le=1)
    """Mean distance of probability and accuracy over 15 equal bins of the probability of the
    chosen class, weighed by their counts: ECE (arXiv:1706.04599, equation 3)."""
    classes: int
    samples: int
    chance: float
    """Top-1 of a blind guess, 1 / classes."""
    reliability: list[ReliabilityBin] = []
    """Bins that have predictions, from low to high probability."""
    confusions: list[Confusion] = []
    """The most frequent ones."""


class ZeroShotTask(TaskConfig):
    """Classify the images of a dataset by prompts."""

    type: Literal["zero_shot"] = "zero_shot"
    class_field: str | None = None
    """Key of the metadata that tells a sample's class; none: what the dataset knows itself."""
    classes: ClassSet | list[str] | None = None
    """Names of the classes, which the field holds by name or number. None: the dataset's own, or
    else the values of the field, each named by the caption of its first sample."""
    prompts: TemplateSet | list[str] | None = None
    """A set by name, or prompts in which `{}` is the name of a class, `{tags}` the tags of its
    first sample. None: the dataset's own, or else `{}`."""

    @field_validator("prompts")
    @classmethod
    def _name_the_class(cls, prompts: TemplateSet | list[str] | None) -> Any:
        if isinstance(prompts, list):
            same = [p for p in prompts if "{}" not in p and "{tags}" not in p]
            if same or not prompts:
                what = f"{same[0]!r} is the same for every class" if same else "there is none"
                message = f"{what}; write {{}} where the name of the class goes"
                raise ValueError(message)
        return prompts

    def measure(self, context: Context) -> Outcome[ZeroShotResult]:
        """Embed the prompts and classify.

        Raises:
            DataError: If a sample has no class, or one that is not among the names.
        """
        data = context.datasets[self.data]
        labels, names, first = self._classes(data)
        tags = [_tags(data, row) for row in first]
        prompts = [
            [_fill(prompt, name, about) for prompt in self._prompts(data)]
            for name, about in zip(names, tags, strict=True)
        ]
        subject, world = context.subject, context.world
        rows = class_embeddings(lambda texts: embed_texts(subject, texts, world).numpy(), prompts)
        return zero_shot_accuracy(
            data.images,
            torch.from_numpy(rows),
            labels,
            logit_scale=subject.logit_scale,
            names=names,
            data=self.data,
            world=world,
        )

    def _classes(
        self, data: EmbeddedDataset
    ) -> tuple[Int64[Tensor, " sample"], list[str], list[int | None]]:
        """The class number of each sample, the classes' names, and the first sample of each."""
        own = data.source.classes
        field = self.class_field or (own.class_field if own else None)
        if field is None:
            message = (
                f"{data.source.location}: nothing tells the class of a sample; set class_field to "
                f"one of: {', '.join(sorted(data.metadata[0])) or 'none there'}"
            )
            raise DataError(message)
        names: list[str] | None = None
        if self.classes is not None:
            names = list(
                class_names(self.classes) if isinstance(self.classes, str) else self.classes
            )
        elif own is not None and field == own.class_field:
            names = list(own.names)
        if names is None:
            labels = data.groups(field)
        else:
            labels = _numbered(data, field, names, is_number=bool(own and field == own.class_field))
        first: list[int | None] = [None] * (len(names) if names else int(labels.max()) + 1)
        for row, label in reversed(list(enumerate(labels.tolist()))):
            first[label] = row
        return labels, names or [data.captions[row or 0][0] for row in first], first

    def _prompts(self, data: EmbeddedDataset) -> list[str]:
        if isinstance(self.prompts, list):
            return self.prompts
        if self.prompts is not None:
            return list(templates(self.prompts))
        own = data.source.classes
        return list(own.templates) if own and own.templates and not self.class_field else ["{}"]


def zero_shot_accuracy(
    images: Float[Tensor, "sample dim"],
    class_rows: Float[Tensor, "class dim"],
    labels: Int64[Tensor, " sample"],
    *,
    logit_scale: float = 100.0,
    names: list[str] | None = None,
    data: str = "",
    world: World | None = None,
) -> Outcome[ZeroShotResult]:
    """Accuracy of the nearest class row; among equal similarities the lower class wins.

    Args:
        images: Unit rows.
        class_rows: Unit rows, one a class.
        labels: Number of each image's class.
        logit_scale: What cosines are multiplied with before the softmax over classes.
        names: Of the classes, for the confusions.
        data: Name of the dataset.
        world: The ranks that share the images.

    Returns:
        The figures; evidence is `predicted`, `labels` and `margins` (cosine of the predicted
        class less that of the true one) of each image.

    Raises:
        ValueError: If there is no image, or a label is not a class.
    """
    if len(images) == 0:
        message = "zero-shot accuracy needs at least one image"
        raise ValueError(message)
    world = world or World()
    numbers = torch.arange(len(class_rows))
    ranks = best_positive_ranks(images, class_rows, labels, numbers, world)
    predicted = top_matches(images, class_rows, 1, world).flatten()
    confidence = _confidence(images, class_rows, logit_scale, world)
    correct = (ranks == 0).double()
    counts = torch.bincount(labels, minlength=len(class_rows))
    present = int((counts > 0).sum())
    # Each image weighs so much that every class that is there weighs the same.
    balanced = correct * (len(images) / present) / counts[labels]
    bins = _reliability(confidence, correct)
    spoken = names or [str(number) for number in numbers.tolist()]
    result = ZeroShotResult(
        data=data,
        top1=exact_mean(correct),
        top5=exact_mean((ranks < 5).double()),
        top10=exact_mean((ranks < 10).double()),
        mean_per_class=min(1.0, exact_mean(balanced)),
        calibration_error=min(
            1.0, sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / len(images)
        ),
        classes=len(class_rows),
        samples=len(images),
        chance=1 / len(class_rows),
        reliability=bins,
        confusions=_confusions(labels, predicted, spoken),
    )
    each = torch.arange(len(images))
    margins = (images.double() * (class_rows[predicted] - class_rows[labels])).sum(dim=1)
    return Outcome(
        result=result,
        scores={
            "top1": Scores(values=correct, clusters=each),
            "top5": Scores(values=(ranks < 5).double(), clusters=each),
            "mean_per_class": Scores(values=balanced, clusters=each),
        },
        evidence={"predicted": predicted, "labels": labels, "margins": margins},
    )


def _confidence(
    images: Float[Tensor, "sample dim"],
    class_rows: Float[Tensor, "class dim"],
    logit_scale: float,
    world: World,
) -> Float[Tensor, " sample"]:
    """The probability of the most probable class of each image."""
    columns = whole_rows(class_rows).T

    def chosen(start: int, stop: int) -> Float[Tensor, " chunk"]:
        logits = whole_rows(images[start:stop]) @ columns * (logit_scale / UNIT)
        return logits.softmax(dim=1).amax(dim=1)

    return over_rows(len(images), world, chosen)


def _reliability(
    confidence: Float[Tensor, " sample"], correct: Float[Tensor, " sample"]
) -> list[ReliabilityBin]:
    # A bin holds what is above its lower edge, up to and with its upper one.
    bins = ((confidence * _BINS).ceil().long() - 1).clamp(0, _BINS - 1)
    found = []
    for number in bins.unique().tolist():
        chosen = bins == number
        found.append(
            ReliabilityBin(
                count=int(chosen.sum()),
                confidence=exact_mean(confidence[chosen]),
                accuracy=exact_mean(correct[chosen]),
            )
        )
    return found


def _confusions(
    labels: Int64[Tensor, " sample"], predicted: Int64[Tensor, " sample"], names: list[str]
) -> list[Confusion]:
    wrong = labels != predicted
    pairs, counts = torch.unique(
        torch.stack([labels[wrong], predicted[wrong]]), dim=1, return_counts=True
    )
    sizes = torch.bincount(labels)
    order = counts.argsort(descending=True, stable=True)[:_CONFUSIONS]
    return [
        Confusion(
            true=names[int(pairs[0, n])],
            predicted=names[int(pairs[1, n])],
            count=int(counts[n]),
            of=int(sizes[pairs[0, n]]),
        )
        for n in order.tolist()
    ]


def _numbered(
    data: EmbeddedDataset, field: str, names: list[str], *, is_number: bool
) -> Int64[Tensor, " sample"]:
    """The class of each sample. A dataset's own field holds numbers, whatever names look like."""
    known = {} if is_number else {name: number for number, name in enumerate(names)}
    known |= {str(number): number for number in range(len(names)) if str(number) not in known}
    values = data.values(field)
    for key, value in zip(data.keys, values, strict=True):
        if value not in known:
            message = (
                f"{data.source.location}: sample {key!r} has {field}={value!r}, which is neither "
                f"one of the {len(names)} class names ({names[0]!r}, …) nor a number from 0 to "
                f"{len(names) - 1}"
            )
            raise DataError(message)
    return torch.tensor([known[value] for value in values])


def _tags(data: EmbeddedDataset, row: int | None) -> str:
    tags = data.metadata[row].get("tags") if row is not None else None
    if isinstance(tags, str):  # a column of a table
        return tags
    return ", ".join(str(tag) for tag in (tags or [])[:_MAX_TAGS])


def _fill(prompt: str, name: str, tags: str) -> str:
    filled = prompt.replace("{}", name).replace("{tags}", tags)
    return filled.strip().removesuffix(",")
