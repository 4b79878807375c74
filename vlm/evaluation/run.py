"""Run the tasks of a configuration on one model."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.config import Config
from vlm.data.dataset import open_reader
from vlm.data.remote import RemoteConfig
from vlm.data.samples import Sample
from vlm.data.sequential import iterate_samples
from vlm.errors import BundleError, DataError
from vlm.evaluation.geometry import Geometry, measure_geometry
from vlm.evaluation.retrieval import RetrievalResult, recall
from vlm.evaluation.tasks import EvaluationConfig, GeometryTask, ZeroShotTask
from vlm.evaluation.zero_shot import ZeroShotResult, zero_shot_accuracy
from vlm.inference import Encoder, ModalityMeans, class_embeddings
from vlm.preprocess import decode_image

__all__ = ["EmbeddedDataset", "Evaluation", "Evidence", "ModelFacts", "embed_dataset", "evaluate",
           "modality_means"]  # fmt: skip

_CHUNK = 256
_MAX_TAGS = 6


class ModelFacts(Config):
    """Which model was evaluated."""

    name: str
    fingerprint: str
    dim: int


class Evaluation(Config):
    """The results by kind and task, as `evaluation.json` holds them."""

    model: ModelFacts
    zero_shot: dict[str, ZeroShotResult] = {}
    retrieval: dict[str, RetrievalResult] = {}
    geometry: dict[str, Geometry] = {}
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EmbeddedDataset:
    """A dataset's samples and embeddings, in order."""

    samples: list[Sample]
    """With their encoded images, which the report shows."""
    images: Float[Tensor, "sample dim"]
    texts: Float[Tensor, "sample dim"]

    def groups(self, field: str | None) -> Int64[Tensor, " sample"]:
        """A number a distinct value of a metadata field, by first appearance.

        Raises:
            DataError: If a sample lacks the field.
        """
        if field is None:
            return torch.arange(len(self.samples))
        numbers: dict[str, int] = {}
        for sample in self.samples:
            if field not in sample.metadata:
                known = ", ".join(sorted(sample.metadata)) or "none"
                message = f"sample {sample.key!r} has no {field!r} in its .json; it has: {known}"
                raise DataError(message)
            numbers.setdefault(str(sample.metadata[field]), len(numbers))
        return torch.tensor([numbers[str(s.metadata[field])] for s in self.samples])


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the figures were computed from, for the report."""

    datasets: dict[str, EmbeddedDataset]
    """By folder."""
    class_rows: dict[str, Float[Tensor, "class dim"]]
    """By zero-shot task; row i is of class number i of `EmbeddedDataset.groups`."""


def evaluate(
    encoder: Encoder, config: EvaluationConfig, *, say: Callable[[str], None]
) -> tuple[Evaluation, Evidence]:
    """Run every task.

    Args:
        encoder: The model.
        config: The tasks; a dataset that several name is embedded once.
        say: Told one line a dataset.

    Returns:
        The figures, and what they were computed from.

    Raises:
        DataError: If a dataset cannot be read, is too small, or lacks a field that a task names.
        BundleError: If the model gives embeddings that are no numbers.
    """
    start = time.monotonic()
    datasets: dict[str, EmbeddedDataset] = {}
    for folder in config.folders():
        began = time.monotonic()
        data = datasets[folder] = embed_dataset(encoder, folder)
        rate = len(data.samples) / max(time.monotonic() - began, 1e-9)
        say(f"{folder}: {len(data.samples)} pairs embedded, {rate:.0f} pairs/s")
    class_rows = {
        name: _class_rows(encoder, datasets[task.shards], task)
        for name, task in config.zero_shot.items()
    }
    evaluation = Evaluation(
        model=ModelFacts(name=encoder.info.name, fingerprint=encoder.fingerprint, dim=encoder.dim),
        zero_shot={
            name: _zero_shot(datasets[task.shards], class_rows[name], task.class_field)
            for name, task in config.zero_shot.items()
        },
        retrieval={
            name: _retrieval(datasets[task.shards], task.group_field)
            for name, task in config.retrieval.items()
        },
        geometry={
            name: _geometry(datasets[task.shards], task, config.seed)
            for name, task in config.geometry.items()
        },
        seconds=round(time.monotonic() - start, 2),
    )
    return evaluation, Evidence(datasets=datasets, class_rows=class_rows)


def embed_dataset(
    encoder: Encoder, location: Path | str, *, max_pairs: int | None = None
) -> EmbeddedDataset:
    """Embed the pairs of a dataset; with `max_pairs`, those with the lowest sample ids.

    Ids are hashes, so the choice is even over shards.

    Raises:
        DataError: If the dataset or one of its images cannot be read.
        BundleError: If the model gives embeddings that are no numbers.
    """
    kept: list[Sample] = []
    images: list[Float[np.ndarray, "batch dim"]] = []
    samples = iterate_samples(location) if max_pairs is None else _some_samples(location, max_pairs)
    chunk: list[Sample] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == _CHUNK:
            images.append(_encode_images(encoder, chunk))
            kept, chunk = kept + chunk, []
    if chunk:
        images.append(_encode_images(encoder, chunk))
        kept += chunk
    texts = encoder.encode_texts([sample.text for sample in kept])
    data = EmbeddedDataset(
        samples=kept, images=torch.from_numpy(np.concatenate(images)), texts=torch.from_numpy(texts)
    )
    _check_finite(encoder, data)
    return data


def modality_means(
    encoder: Encoder, locations: Sequence[Path | str], *, max_pairs: int
) -> ModalityMeans:
    """Mean image and mean caption embedding over (up to `max_pairs` of) one or more datasets."""
    share = -(-max_pairs // len(locations))
    parts = [embed_dataset(encoder, location, max_pairs=share) for location in locations]
    return ModalityMeans(
        image=torch.cat([part.images for part in parts]).double().mean(dim=0).tolist(),
        text=torch.cat([part.texts for part in parts]).double().mean(dim=0).tolist(),
        num_pairs=sum(len(part.samples) for part in parts),
    )


def _check_finite(encoder: Encoder, data: EmbeddedDataset) -> None:
    for modality, rows in (("images", data.images), ("captions", data.texts)):
        bad = int((~torch.isfinite(rows).all(dim=1)).sum())
        if bad:
            message = (
                f"model {encoder.info.name!r}: the embeddings of {bad} of {len(rows)} {modality} "
                f"are not finite numbers. The training diverged; train with a lower optim.lr"
            )
            raise BundleError(message)


def _encode_images(encoder: Encoder, samples: list[Sample]) -> Float[np.ndarray, "batch dim"]:
    decoded = []
    for sample in samples:
        try:
            decoded.append(decode_image(sample.image, min_side=encoder.info.image.decode_side()))
        except DataError as error:
            message = f"sample {sample.key!r}: {error}"
            raise DataError(message) from error
    return encoder.encode_images(decoded)


def _some_samples(location: Path | str, count: int) -> Iterator[Sample]:
    reader, _ = open_reader(str(location), remote=RemoteConfig(), run_length=1)
    with reader:
        rows = np.sort(np.argsort(reader.manifest.sample_ids)[:count])
        reader.expect(rows)
        for row in rows.tolist():
            yield reader.read(row)


def _class_rows(
    encoder: Encoder, data: EmbeddedDataset, task: ZeroShotTask
) -> Float[Tensor, "class dim"]:
    prompts: dict[int, list[str]] = {}
    for label, sample in zip(data.groups(task.class_field).tolist(), data.samples, strict=True):
        if label not in prompts:
            prompts[label] = [_fill(prompt, sample) for prompt in task.prompts]
    rows = class_embeddings(encoder.encode_texts, [prompts[i] for i in range(len(prompts))])
    return torch.from_numpy(rows)


def _zero_shot(
    data: EmbeddedDataset, class_rows: Float[Tensor, "class dim"], class_field: str
) -> ZeroShotResult:
    return zero_shot_accuracy(data.images, class_rows, data.groups(class_field))


def _fill(prompt: str, sample: Sample) -> str:
    tags = ", ".join(str(tag) for tag in (sample.metadata.get("tags") or [])[:_MAX_TAGS])
    filled = prompt.replace("{text}", sample.text).replace("{tags}", tags)
    return filled.strip().removesuffix(",")


def _retrieval(data: EmbeddedDataset, group_field: str | None) -> RetrievalResult:
    groups = data.groups(group_field)
    return RetrievalResult(
        image_to_text=recall(data.images, data.texts, groups, groups),
        text_to_image=recall(data.texts, data.images, groups, groups),
    )


def _geometry(data: EmbeddedDataset, task: GeometryTask, seed: int) -> Geometry:
    generator = torch.Generator().manual_seed(seed)
    groups = data.groups(task.group_field)
    try:
        return measure_geometry(data.images, data.texts, generator, groups=groups)
    except ValueError as error:
        message = f"{task.shards}: {error}"
        raise DataError(message) from error
