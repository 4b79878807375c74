"""Zero-shot classification of images among classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from serving.errors import BadInputError
from serving.services.embedding import Embedder
from serving.services.fetching import RemoteImage
from vlm.inference import (
    NAMED_TEMPLATES,
    BundleInfo,
    doubled_label,
    exclusive_probabilities,
    expanded_templates,
    fill_templates,
    independent_probabilities,
    normalised,
)

__all__ = [
    "Classes",
    "Mode",
    "Prediction",
    "Verdict",
    "check_labels",
    "check_mode",
    "classify",
    "described_classes",
    "probabilities",
    "prompts_of",
]

Mode = Literal["exclusive", "independent"]


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What images are classified among."""

    labels: Sequence[str]
    rows: np.ndarray
    """Unit rows, [class dim]."""
    temperature: float = 1.0
    """Logits are divided by it."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One label of one image."""

    label: str
    probability: float
    score: float
    """Cosine similarity, -1 to 1."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one image shows."""

    predictions: list[Prediction]
    """Most probable first, equal ones in the order given."""
    none_of_these: bool | None
    """Whether no class is probable enough; None where no threshold was given."""


def check_labels(labels: Sequence[str], place: str) -> None:
    """Raise BadInputError if two are equal: they would share what is one label's probability."""
    doubled = doubled_label(labels)
    if doubled is not None:
        message = f"{place}: the label {doubled[:64]!r} is given twice"
        raise BadInputError(message)


async def described_classes(
    embedder: Embedder, labels: Sequence[str], templates: Sequence[str]
) -> Classes:
    """Classes that are given by words alone.

    Args:
        embedder: The model.
        labels: At least one.
        templates: Prompts with `{}` where the label goes, or names of `NAMED_TEMPLATES`; the
            embeddings of all are averaged.

    Raises:
        BadInputError: If a template is neither, or two labels are equal.
    """
    check_labels(labels, "labels")
    prompts = [prompts_of(label, templates) for label in labels]
    rows = await embedder.text_rows([prompt for some in prompts for prompt in some])
    means = rows.reshape(len(labels), len(prompts[0]), -1).mean(axis=1)
    return Classes(labels=labels, rows=normalised(means))


async def classify(
    embedder: Embedder,
    images: Sequence[bytes | RemoteImage],
    classes: Classes,
    *,
    mode: Mode,
    top_k: int,
    none_threshold: float | None = None,
) -> list[Verdict]:
    """What each image shows.

    Args:
        embedder: The model whose rows the classes are.
        images: Image files.
        classes: At least one.
        mode: `exclusive` if exactly one label holds (softmax), `independent` if any number may
            (sigmoid with the model's own bias).
        top_k: Most labels an image.
        none_threshold: If the largest probability is below, none of the classes is shown.

    Raises:
        BadInputError: If an image cannot be decoded, or `independent` is asked of a model that has
            no bias.
    """
    check_mode(mode, embedder.info)
    files = {f"images.{number}": image for number, image in enumerate(images)}
    cosines = await embedder.image_rows(await embedder.prepare(files)) @ classes.rows.T
    table = probabilities(cosines, embedder.info, mode, classes.temperature)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top_k]
    return [
        Verdict(
            predictions=[
                Prediction(
                    label=classes.labels[column],
                    probability=float(table[row, column]),
                    score=float(cosines[row, column]),
                )
                for column in columns.tolist()
            ],
            none_of_these=None
            if none_threshold is None
            else bool(table[row].max() < none_threshold),
        )
        for row, columns in enumerate(order)
    ]


def check_mode(mode: Mode, *infos: BundleInfo) -> None:
    """Raise BadInputError where none of some models can answer in a mode."""
    if mode == "independent" and all(info.logit_bias is None for info in infos):
        message = (
            "mode independent needs a model with a logit bias, as a sigmoid loss trains it, and "
            "here is none; use mode exclusive"
        )
        raise BadInputError(message)


def probabilities(
    cosines: np.ndarray, info: BundleInfo, mode: Mode, temperature: float = 1.0
) -> np.ndarray:
    """Of each image (row) and class (column), with the model's own scale and bias."""
    scale = info.logit_scale / temperature
    if mode == "independent" and info.logit_bias is not None:
        return independent_probabilities(cosines, scale, info.logit_bias / temperature)
    return exclusive_probabilities(cosines, scale)


def prompts_of(label: str, templates: Sequence[str]) -> list[str]:
    """The prompts of one label; BadInputError if a template is neither known nor has `{}`."""
    try:
        return fill_templates(label, expanded_templates(templates))
    except ValueError as error:
        known = ", ".join(NAMED_TEMPLATES)
        message = f"{error}, and is not the name of some: {known}"
        raise BadInputError(message) from error
