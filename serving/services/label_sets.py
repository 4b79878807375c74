"""Label sets: classes that are defined once, kept on disk, and asked about by name.

A class is defined by words, by example images, or by both, mixed. Its row is computed when a model
is first asked about it, and again for another model: what is stored are words and pictures.
"""

import asyncio
import errno
import hashlib
import json
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import Field

from serving.caching import FileCache
from serving.encoding import from_base64
from serving.errors import BadInputError, NotFoundError
from serving.services.classification import Classes, Mode, check_labels, prompts_of
from serving.services.embedding import Embedder
from serving.together import together
from vlm.config import Config
from vlm.files import open_whole
from vlm.inference import BundleInfo, normalised
from vlm.inference.temperature import TEMPERATURE_RANGE

__all__ = [
    "Calibration",
    "LabelClass",
    "LabelSet",
    "LabelSets",
    "VersionedSet",
    "check_label_set",
    "check_weights",
    "with_version",
]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REMEMBERED: Final = 64
_KEPT_BYTES: Final = 64 * 2**20
_SLACK: Final = 1.01
"""The fit of a temperature ends a rounding beside the limits of its range."""

Fraction = Annotated[float, Field(ge=0, le=1)]


class LabelClass(Config):
    """One class, by words, pictures, or both."""

    label: str = Field(min_length=1)
    prompts: Annotated[list[str], Field(min_length=1)] | None = None
    """Texts in place of the label in the set's templates."""
    images: list[str] = []
    """Example images, base64 of small WebP (very long ones: PNG) files without loss."""
    image_weight: Fraction = 0.5
    """Of the images against the words; 1: images alone."""

    @property
    def uses_words(self) -> bool:
        return not self.images or self.image_weight < 1

    @property
    def uses_images(self) -> bool:
        return bool(self.images) and self.image_weight > 0


class Calibration(Config):
    """What a labelled sample taught about one model's probabilities."""

    temperature: float = Field(ge=TEMPERATURE_RANGE[0] / _SLACK, le=TEMPERATURE_RANGE[1] * _SLACK)
    none_threshold: Fraction | None
    mode: Literal["exclusive", "independent"]
    num_samples: int = Field(ge=0)
    num_none: int = Field(ge=0)
    """Samples that show none of the classes."""
    accuracy: Fraction
    """Of those that show one."""
    ece_before: Fraction
    ece_after: Fraction

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
    templates: list[str] = Field(["{}"], min_length=1)
    mode: Literal["exclusive", "independent"] = "exclusive"
    none_threshold: Fraction | None = None
    calibrations: dict[str, Calibration] = {}
    """By fingerprint of the model; those of another version of the set are dropped."""

    def calibration_for(self, fingerprint: str, mode: Mode) -> Calibration | None:
        """What is known of a model in a mode."""
        found = self.calibrations.get(fingerprint)
        return found if found is not None and found.mode == mode else None


@dataclass(frozen=True)
class VersionedSet:
    """A set and its version, which is computed once: with many pictures that takes a while.

    Not a property that is remembered: a changed copy of the set would carry it along.
    """

    label_set: LabelSet
    version: str
    """A hash of everything that decides the rows."""


async def with_version(label_set: LabelSet) -> VersionedSet:
    """The set with its version; hashed in a thread, so that others go on."""
    return await asyncio.to_thread(_versioned, label_set)


class LabelSets:
    """Label sets in a folder, a file each; other processes may write there too.

    Args:
        folder: Made when the first set is stored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: FileCache[VersionedSet] = FileCache(_KEPT_BYTES)
        self._rows: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._writes = asyncio.Lock()
        self._writing = threading.Lock()
        """Also held by a write whose request was given up, which lets go of the other."""

    async def names(self) -> list[str]:
        paths = await asyncio.to_thread(lambda: sorted(self._folder.glob("*.json")))
        return [path.stem for path in paths if _NAME.fullmatch(path.stem)]

    async def get(self, name: str) -> VersionedSet:
        """Raises NotFoundError if there is none of that name, BadInputError if it is damaged."""
        return await asyncio.to_thread(self._read, name)

    async def put(self, name: str, label_set: LabelSet) -> VersionedSet:
        """Store a set, replacing one of that name; calibrations stay if the version does.

        Raises:
            BadInputError: If the name is none or that of a folder, two labels are equal, or a
                template has no place.
        """
        if not _NAME.fullmatch(name):
            message = "a label set's name is letters, digits, '.', '_' and '-', 128 at most"
            raise BadInputError(message)
        check_label_set(label_set)
        version = (await with_version(label_set)).version
        async with self._writes:
            calibrations = await asyncio.to_thread(self._calibrations, name, version)
            label_set = label_set.model_copy(update={"calibrations": calibrations})
            await asyncio.to_thread(self._write, name, label_set)
        return VersionedSet(label_set, version)

    async def calibrate(self, name: str, version: str, model: str, found: Calibration) -> None:
        """Keep what was found of one model; NotFoundError if the set has changed since."""
        async with self._writes:
            found_set = await self.get(name)
            if found_set.version != version:
                message = f"label set {name!r} was replaced meanwhile; calibrate it again"
                raise NotFoundError(message)
            calibrations = {**found_set.label_set.calibrations, model: found}
            changed = found_set.label_set.model_copy(update={"calibrations": calibrations})
            await asyncio.to_thread(self._write, name, changed)

    async def delete(self, name: str) -> None:
        """Raises NotFoundError if there is none of that name, BadInputError if it is a folder."""
        async with self._writes:
            path = self._path(name)
            try:
                await asyncio.to_thread(path.unlink)  # without reading it: it may be damaged
            except FileNotFoundError as error:
                raise _none_called(name) from error
            except IsADirectoryError as error:
                raise _folder_called(name) from error
            self._kept.forget(name)

    async def classes(self, asked: VersionedSet, embedder: Embedder, mode: Mode) -> Classes:
        """The rows of a set for one model, computed when first asked for; calibrated if it is.

        Raises:
            BadInputError: If words and pictures stand side by side and the model does not know
                where its modalities lie.
        """
        label_set = asked.label_set
        key = (asked.version, embedder.info.fingerprint)
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

    def _read(self, name: str) -> VersionedSet:
        path = self._path(name)
        try:
            file = path.stat()
            if not stat.S_ISREG(file.st_mode):  # of a pipe one could wait for ever
                raise _damaged(name)
            kept = self._kept.get(name, file)
            if kept is None:
                kept = _versioned(_parsed(path.read_bytes()))
                self._kept.put(name, file, kept)
        except FileNotFoundError as error:
            raise _none_called(name) from error
        except ValueError as error:
            raise _damaged(name) from error
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise _damaged(name) from error
        return kept

    def _calibrations(self, name: str, version: str) -> dict[str, Calibration]:
        try:
            old = self._read(name)
        except (NotFoundError, BadInputError):
            return {}
        return old.label_set.calibrations if old.version == version else {}

    def _write(self, name: str, label_set: LabelSet) -> None:
        data = label_set.model_dump_json().encode() + b"\n"
        try:
            with self._writing:
                self._folder.mkdir(parents=True, exist_ok=True)
                with open_whole(self._path(name)) as file:
                    file.write(data)
        except IsADirectoryError as error:
            raise _folder_called(name) from error
        self._kept.forget(name)


def _none_called(name: str) -> NotFoundError:
    return NotFoundError(f"no label set is called {name[:64]!r}")


def _damaged(name: str) -> BadInputError:
    return BadInputError(f"label set {name!r}: its file is damaged; store it again")


def _folder_called(name: str) -> BadInputError:
    message = (
        f"label set {name!r}: a folder lies in the place of its file, and is left alone; take "
        f"another name, or have the folder removed"
    )
    return BadInputError(message)


def _parsed(data: bytes) -> LabelSet:
    """What a file says; ValueError if that could not be asked about."""
    label_set = LabelSet.model_validate_json(data)
    try:
        check_label_set(label_set)
    except BadInputError as error:
        raise ValueError(str(error)) from error
    for c in label_set.classes:
        for image in c.images:
            from_base64(image)
    return label_set


def _versioned(label_set: LabelSet) -> VersionedSet:
    """Piece by piece: text of megabytes made at once would hold up all other threads."""
    tree = label_set.model_dump(mode="json", include={"classes", "templates"})
    digest = hashlib.sha256()
    for piece in json.JSONEncoder(sort_keys=True).iterencode(tree):
        digest.update(piece.encode())
    return VersionedSet(label_set, digest.hexdigest())


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
    words, pictures = await together(
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
    files = await asyncio.to_thread(_example_files, [c for c in classes if c.uses_images])
    rows = await embedder.image_rows(await embedder.prepare(files))
    return _means(rows, counts)


def _example_files(classes: Sequence[LabelClass]) -> dict[str, bytes]:
    return {
        f"classes.{c.label}.images.{n}": from_base64(image)
        for c in classes
        for n, image in enumerate(c.images)
    }


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
