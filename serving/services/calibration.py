"""Fitting the probabilities of a label set to a labelled sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from serving.errors import BadInputError
from serving.services.classification import Classes, Mode, check_mode, probabilities
from serving.services.embedding import Embedder
from serving.services.label_sets import Calibration
from vlm.inference.temperature import (
    calibration_error,
    fit_exclusive_temperature,
    fit_independent_temperature,
    fit_none_threshold,
)

__all__ = ["LabelledImage", "fit_calibration"]


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image file and what it shows; None: none of the classes."""

    image: bytes
    label: str | None


async def fit_calibration(
    embedder: Embedder, classes: Classes, samples: Sequence[LabelledImage], *, mode: Mode
) -> Calibration:
    """Temperature, and a threshold for "none of these" if some samples show none.

    Raises:
        BadInputError: If a label is unknown, an image cannot be decoded, or fewer than two samples
            show a class.
    """
    check_mode(mode, embedder.info)
    columns = {label: number for number, label in enumerate(classes.labels)}
    targets = _targets(columns, samples)
    files = {f"samples.{number}.image": sample.image for number, sample in enumerate(samples)}
    cosines = await embedder.image_rows(await embedder.prepare(files)) @ classes.rows.T
    known = targets >= 0
    if known.sum() < 2:
        message = "calibration needs at least 2 samples that show a class, better some hundred"
        raise BadInputError(message)
    scale, bias = embedder.info.logit_scale, embedder.info.logit_bias or 0.0
    if mode == "exclusive":
        temperature = fit_exclusive_temperature(scale * cosines[known], targets[known])
    else:
        holds = targets[:, None] == np.arange(len(classes.labels))
        temperature = fit_independent_temperature(scale * cosines + bias, holds)
    before = probabilities(cosines, embedder.info, mode)
    after = probabilities(cosines, embedder.info, mode, temperature)
    right = after[known].argmax(axis=1) == targets[known]
    largest = after.max(axis=1)
    return Calibration(
        temperature=temperature,
        none_threshold=None if known.all() else fit_none_threshold(largest[known], largest[~known]),
        mode=mode,
        num_samples=len(samples),
        num_none=int((~known).sum()),
        accuracy=float(right.mean()),
        ece_before=calibration_error(before[known].max(axis=1), right),
        ece_after=calibration_error(largest[known], right),
    )


def _targets(columns: Mapping[str, int], samples: Sequence[LabelledImage]) -> np.ndarray:
    found = []
    for number, sample in enumerate(samples):
        if sample.label is not None and sample.label not in columns:
            message = f"samples.{number}.label: {sample.label[:64]!r} is none of the set's labels"
            raise BadInputError(message)
        found.append(-1 if sample.label is None else columns[sample.label])
    return np.array(found)
