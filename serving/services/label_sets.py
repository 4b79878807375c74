"""Label sets: classes that are defined once, kept on disk, and asked about by name.

A class is defined by words, by example images, or by both, mixed. Its row is computed when a model
is first asked about it, and again for another model: what is stored are words and pictures.
"""

import asyncio
import base64
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import Field, ValidationError

from serving.errors import BadInputError, NotFoundError
from serving.services.classification import Classes, Mode, check_labels, prompts_of
from serving.services.embedding import Embedder
from vlm.config import Config
from vlm.files import write_text_whole
from vlm.inference import BundleInfo, normalised
from vlm.inference.temperature import TEMPERATURE_RANGE

__all__ = ["Calibration", "LabelClass", "LabelSet", "LabelSets", "check_label_set", "check_weights"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REMEMBERED: Final = 64


class LabelClass(Config):
    """One class, by words, pictures, or both."""

    label: str
    prompts: list[str] | None = None
    """Texts in place of the label in the set's templates."""
    images: list[str] = []
    """Example images, base64 of small WebP files without loss."""
    image_weight: float = Field(0.5, ge=0, le=1)
    """Of the images against the words; 1: images alone."""

    @property
    def uses_words(self) -> bool:
        return not self.images or self.image_weight < 1

    @property
    def uses_images(self) -> bool:
        return bool(self.images) and self.image_weight > 0


class Calibration(Config):
    """What a labelled sample taught about one model's probabilities."""

    temperature: float
    none_threshold: float | None
    mode: Literal["exclusive", "independent"]
    num_samples: int
    num_none: int
    """Samples that show none of the classes."""
    accuracy: float
    """Of those that show one."""
    ece_before: float
    ece_after: float

    @property
    def note(self) -> str | None:
        """What to make of it, where the sample did not settle the temperature."""
        low, high = TEMPERATURE_RANGE
        if 1.01 * low < self.temperature < 0.99 * high:
            return self._note_on_error
        found = "hardly a mistake" if self.temperature < 1 else "hardly anything right"
        return (
            f"temperature {self.temperature:.2f} is a limit of its range, {low:g} to {high:g}: the "
            f"sample holds {found}, and says little of how sure to be; calibrate with more images"
        )

    @property
    def _note_on_error(self) -> str | None:
        if self.ece_after <= self.ece_before:
            return None
        return (
            f"the calibration error rose from {self.ece_before:.3f} to {self.ece_after:.3f}: what "
            f"is fitted is the likelihood, and {self.num_samples} samples may be too few for both; "
            f"calibrate with more images"
        )


class LabelSet(Config):
    """What is stored of a set."""

    classes: list[LabelClass] = Field(min_length=1)
    templates: list[str] = ["{}"]
    mode: Literal["exclusive", "independent"] = "exclusive"
    none_threshold: float | None = Field(None, ge=0, le=1)
    calibrations: dict[str, Calibration] = {}
    """By fingerprint of the model; those of another version of the set are dropped."""

    @property
    def version(self) -> str:
        """A hash of everything that decides the rows."""
        tree = self.model_dump(mode="json", include={"classes", "templates"})
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def calibration_for(self, fingerprint: str, mode: Mode) -> Calibration | None:
        """What is known of a model in a mode."""
        found = self.calibrations.get(fingerprint)
        return found if found is not None and found.mode == mode else None


@dataclass
class _Kept:
    stamp: int
    label_set: LabelSet


class LabelSets:
    """Label sets in a folder, a file each; other processes may write there too.

    Args:
        folder: Made when the first set is stored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[str, _Kept] = {}
        self._rows: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._writes = asyncio.Lock()

    async def names(self) -> list[str]:
        paths = await asyncio.to_thread(lambda: sorted(self._folder.glob("*.json")))
        return [path.stem for path in paths if _NAME.fullmatch(path.stem)]

    async def get(self, name: str) -> LabelSet:
        """Raises NotFoundError if there is none of that name."""
        return await asyncio.to_thread(self._read, name)

    async def put(self, name: str, label_set: LabelSet) -> LabelSet:
        """Store a set, replacing one of that name; calibrations stay if the version does.

        Raises:
            BadInputError: If the name is none, two labels are equal, or a template has no place.
        """
        if not _NAME.fullmatch(name):
            message = "a label set's name is letters, digits, '.', '_' and '-', 128 at most"
            raise BadInputError(message)
        check_label_set(label_set)
        async with self._writes:
            calibrations = await asyncio.to_thread(self._calibrations, name, label_set.version)
            label_set = label_set.model_copy(update={"calibrations": calibrations})
            await asyncio.to_thread(self._write, name, label_set)
        return label_set

    async def calibrate(self, name: str, version: str, model: str, found: Calibration) -> None:
        """Keep what was found of one model; NotFoundError if the set has changed since."""
        async with self._writes:
            label_set = await self.get(name)
            if label_set.version != version:
                message = f"label set {name!r} was replaced meanwhile; calibrate it again"
                raise NotFoundError(message)
            calibrations = {**label_set.calibrations, model: found}
            changed = label_set.model_copy(update={"calibrations": calibrations})
            await asyncio.to_thread(self._write, name, changed)

    async def delete(self, name: str) -> None:
        """Raises NotFoundError if there is none of that name."""
        async with self._writes:
            path = self._path(name)
            try:
                await asyncio.to_thread(path.unlink)  # without reading it: it may be damaged
            except FileNotFoundError as error:
                raise _none_called(name) from error
            self._kept.pop(name, None)

    async def classes(self, label_set: LabelSet, embedder: Embedder, mode: Mode) -> Classes:
        """The rows of a set for one model, computed when first asked for; calibrated if it is.

        Raises:
            BadInputError: If words and pictures stand side by side and the model does not know
                where its modalities lie.
        """
        key = (label_set.version, embedder.info.fingerprint)
        rows = self._rows.get(key)
        if rows is None:
            rows = await _class_rows(label_set, embedder)
            self._rows[key] = rows
            while len(self._rows) > _REMEMBERED:
                self._rows.popitem(last=False)
        self._rows.move_to_end(key)
        calibration = label_set.calibration_for(embedder.info.fingerprint, mode)
        return Classes(
            labels=[c.label for c in label_set.classes],
            rows=rows,
            temperature=1.0 if calibration is None else calibration.temperature,
        )

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise _none_called(name)
        return self._folder / f"{name}.json"

    def _read(self, name: str) -> LabelSet:
        path = self._path(name)
        try:
            stamp = path.stat().st_mtime_ns
            kept = self._kept.get(name)
            if kept is None or kept.stamp != stamp:
                text = path.read_text(encoding="utf-8")
                kept = self._kept[name] = _Kept(stamp, LabelSet.model_validate_json(text))
        except FileNotFoundError as error:
            raise _none_called(name) from error
        except ValidationError as error:
            message = f"label set {name!r}: its file is damaged; store it again"
            raise BadInputError(message) from error
        return kept.label_set

    def _calibrations(self, name: str, version: str) -> dict[str, Calibration]:
        try:
            old = self._read(name)
        except (NotFoundError, BadInputError):
            return {}
        return old.calibrations if old.version == version else {}

    def _write(self, name: str, label_set: LabelSet) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text_whole(self._path(name), label_set.model_dump_json() + "\n")
        self._kept.pop(name, None)


def _none_called(name: str) -> NotFoundError:
    return NotFoundError(f"no label set is called {name[:64]!r}")


def check_label_set(label_set: LabelSet) -> None:
    """Raise BadInputError if two labels are equal, or a template has no place for one."""
    check_labels([c.label for c in label_set.classes], "classes")
    for c in label_set.classes:
        if c.prompts is None:
            prompts_of(c.label, label_set.templates)


def check_weights(classes: Sequence[LabelClass], *infos: BundleInfo) -> None:
    """Raise BadInputError where none of some models can compare words with images, as these ask."""
    weights = {c.image_weight if c.images else 0.0 for c in classes}
    if len(weights) > 1 and all(info.modality_means is None for info in infos):
        message = (
            "classes lean on images by different weights, and this model's bundle has no modality "
            "means to compare them by; give images to all classes, with one weight, or to none"
        )
        raise BadInputError(message)


async def _class_rows(label_set: LabelSet, embedder: Embedder) -> np.ndarray:
    """One unit row a class, [class dim]."""
    classes = label_set.classes
    words, pictures = await asyncio.gather(
        _word_rows(label_set, embedder), _picture_rows(classes, embedder)
    )
    check_weights(classes, embedder.info)
    mixed = []
    for c, word, picture in zip(classes, words, pictures, strict=True):
        weight = c.image_weight if c.images else 0.0
        moved = picture if picture is None else _as_text(picture, embedder.info)
        parts = [(1 - weight, word), (weight, moved)]
        mixed.append(sum(share * row for share, row in parts if row is not None and share > 0))
    return normalised(np.stack(mixed).astype(np.float32))


async def _word_rows(label_set: LabelSet, embedder: Embedder) -> list[np.ndarray | None]:
    prompts = [
        (c.prompts or prompts_of(c.label, label_set.templates)) if c.uses_words else []
        for c in label_set.classes
    ]
    rows = await embedder.text_rows([prompt for some in prompts for prompt in some])
    return _means(rows, [len(some) for some in prompts])


async def _picture_rows(
    classes: Sequence[LabelClass], embedder: Embedder
) -> list[np.ndarray | None]:
    counts = [len(c.images) if c.uses_images else 0 for c in classes]
    used = [c for c in classes if c.uses_images]
    files = {
        f"classes.{c.label}.images.{n}": base64.b64decode(image)
        for c in used
        for n, image in enumerate(c.images)
    }
    rows = await embedder.image_rows(await embedder.prepare(files))
    return _means(rows, counts)


def _means(rows: np.ndarray, counts: Sequence[int]) -> list[np.ndarray | None]:
    """The unit mean of each class's rows; None for a class that has none."""
    parts = np.split(rows, np.cumsum(counts)[:-1])
    return [normalised(p.mean(axis=0, keepdims=True))[0] if len(p) else None for p in parts]


def _as_text(picture: np.ndarray, info: BundleInfo) -> np.ndarray:
    """An image's row moved to where the texts of the model lie.

    Images lie nearer to each other than to any text, so a class of pictures would win against
    classes of words whatever is shown; the shift by the modalities' means takes that away.

    Source: the modality gap as a constant shift, Liang et al. 2022 (arXiv:2203.02053, section 3).
    """
    if info.modality_means is None:
        return picture
    image, text = np.array(info.modality_means.image), np.array(info.modality_means.text)
    return normalised((picture - image + text)[None].astype(np.float32))[0]
