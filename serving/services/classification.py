"""Zero-shot classification of images among labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from serving.errors import BadInputError
from serving.services.embedding import Embedder
from vlm.inference import (
    exclusive_probabilities,
    fill_templates,
    independent_probabilities,
    normalised,
)

__all__ = ["Mode", "Prediction", "classify"]

Mode = Literal["exclusive", "independent"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One label of one image."""

    label: str
    probability: float
    score: float
    """Cosine similarity, -1 to 1."""


async def classify(
    embedder: Embedder,
    images: Sequence[bytes],
    labels: Sequence[str],
    *,
    templates: Sequence[str],
    mode: Mode,
    top_k: int,
) -> list[list[Prediction]]:
    """For each image its most probable labels, best first, equal ones in the order given.

    Args:
        embedder: The model.
        images: Image files.
        labels: At least one.
        templates: Prompts with `{}` where the label goes; their embeddings are averaged.
        mode: `exclusive` if exactly one label holds (softmax), `independent` if any number may
            (sigmoid with the model's own bias).
        top_k: Most labels an image.

    Raises:
        BadInputError: If an image cannot be decoded, a template lacks `{}`, or `independent` is
            asked of a model that has no bias.
    """
    info = embedder.info
    if mode == "independent" and info.logit_bias is None:
        message = (
            "mode independent needs a model trained with a sigmoid loss, and this one has no "
            "logit bias; use mode exclusive"
        )
        raise BadInputError(message)
    try:
        prompts = [prompt for label in labels for prompt in fill_templates(label, templates)]
    except ValueError as error:
        raise BadInputError(str(error)) from error
    files = {f"images.{number}": image for number, image in enumerate(images)}
    image_rows = await embedder.image_rows(await embedder.prepare(files))
    prompt_rows = await embedder.text_rows(prompts)
    class_rows = normalised(prompt_rows.reshape(len(labels), len(templates), -1).mean(axis=1))
    cosines = image_rows @ class_rows.T
    if info.logit_bias is not None and mode == "independent":
        probabilities = independent_probabilities(cosines, info.logit_scale, info.logit_bias)
    else:
        probabilities = exclusive_probabilities(cosines, info.logit_scale)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top_k]
    return [
        [
            Prediction(
                label=labels[column],
                probability=float(probabilities[row, column]),
                score=float(cosines[row, column]),
            )
            for column in columns.tolist()
        ]
        for row, columns in enumerate(order)
    ]
