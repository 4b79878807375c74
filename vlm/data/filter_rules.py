"""Which samples a filter drops: its configuration, and the rules that judge a sample by itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from vlm.config import Config
from vlm.data.duplicates import Likeness
from vlm.data.samples import Sample
from vlm.errors import DataError

__all__ = ["FilterConfig", "MetadataConfig", "Rule", "Traits", "metadata_table", "sample_rules"]

FILTER_NAME: Final = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"

Number = int | float


class MetadataConfig(Config):
    """Bounds for a number that a sample carries, e.g. img2dataset's `punsafe` or `similarity`."""

    field: str = Field(min_length=1)
    """Key in the sample's `.json`, else column of the shard's `.parquet` of the same stem."""
    min: float | None = None
    max: float | None = None
    missing: Literal["keep", "drop"] = "keep"
    """What becomes of samples without this field, or where it is no number."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> "MetadataConfig":
        if self.min is None and self.max is None:
            message = f"field {self.field!r}: at least one of min and max must be given"
            raise ValueError(message)
        _check_order("min", self.min, "max", self.max)
        return self


class FilterConfig(Config):
    """Rules of a filter; one that is left out is off. Undecodable images are dropped always.

    The image and text rules are those of ALIGN (arXiv:2102.05918, section 3), which asks for
    strictly more than 200 px and strictly less than 3:1.
    """

    name: str = Field("default", pattern=FILTER_NAME)
    """The filter is written to `filters/NAME.npy` and `filters/NAME.json`."""
    min_side: int | None = Field(None, ge=1)
    """Least pixels of the shorter side."""
    max_aspect: float | None = Field(None, ge=1)
    """Most of longer over shorter side."""
    max_captions_per_image: int | None = Field(None, ge=1)
    """Most distinct captions of images of equal bytes; over it, all of them are dropped."""
    max_images_per_caption: int | None = Field(None, ge=1)
    """Most distinct images under one caption, case aside; over it, all of them are dropped."""
    min_words: int | None = Field(None, ge=1)
    max_words: int | None = Field(None, ge=1)
    min_ngram_count: int | None = Field(None, ge=1)
    """Drops captions with a unigram or bigram that all captions together hold fewer times."""
    max_ngrams: int | None = Field(None, ge=1)
    """Drops captions with a unigram or bigram outside so many most frequent; ties are inside."""
    metadata: tuple[MetadataConfig, ...] = ()
    exact_duplicates: Literal["image", "image_and_caption"] | None = None
    """Keeps the first of samples with equal image bytes, or equal bytes and caption."""
    near_duplicates: Likeness | None = None
    """Keeps the first of each group of images that a chain of likenesses connects."""
    decontaminate: tuple[Path, ...] = ()
    """Folders of shards or of images to evaluate on: images equal or alike are dropped."""
    decontaminate_likeness: Likeness | None = Likeness()
    """What is alike to an evaluation image; null asks for equal bytes."""
    decontaminate_captions: bool = False
    """Drops also samples with a caption of the evaluation folders, case aside."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "FilterConfig":
        _check_order("min_words", self.min_words, "max_words", self.max_words)
        fields = [rule.field for rule in self.metadata]
        twice = sorted({name for name in fields if fields.count(name) > 1})
        if twice:
            message = f"metadata: field {twice[0]!r} comes twice; give min and max in one item"
            raise ValueError(message)
        if self.decontaminate_captions and not self.decontaminate:
            message = "decontaminate_captions: true needs folders in decontaminate, found none"
            raise ValueError(message)
        return self

    @property
    def counts_ngrams(self) -> bool:
        return self.min_ngram_count is not None or self.max_ngrams is not None


def _check_order(low: str, least: Number | None, high: str, most: Number | None) -> None:
    if least is not None and most is not None and least > most:
        message = f"{low}={least} is above {high}={most}, so nothing would be kept"
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What the rules judge of one sample."""

    width: int
    height: int
    num_words: int
    values: dict[str, Any] = field(default_factory=dict)
    """Metadata by field."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A number of a sample and its bounds, both inclusive."""

    name: str
    measure: Callable[[Traits], Number | None]
    """None where the sample does not have it."""
    least: Number | None = None
    most: Number | None = None
    drops_missing: bool = False

    def fails(self, value: Number | None) -> bool:
        if value is None:
            return self.drops_missing
        below = self.least is not None and value < self.least
        return below or (self.most is not None and value > self.most)


def sample_rules(config: FilterConfig) -> list[Rule]:
    """The rules that are on and look at one sample at a time, in the order of their report."""
    rules = [
        Rule(name="min_side", measure=lambda t: min(t.width, t.height), least=config.min_side),
        Rule(
            name="max_aspect",
            measure=lambda t: max(t.width, t.height) / min(t.width, t.height),
            most=config.max_aspect,
        ),
        Rule(name="min_words", measure=lambda t: t.num_words, least=config.min_words),
        Rule(name="max_words", measure=lambda t: t.num_words, most=config.max_words),
        *(_metadata_rule(bounds) for bounds in config.metadata),
    ]
    return [rule for rule in rules if rule.least is not None or rule.most is not None]


def _metadata_rule(bounds: MetadataConfig) -> Rule:
    return Rule(
        name=f"metadata.{bounds.field}",
        measure=lambda traits: _number(traits.values.get(bounds.field)),
        least=bounds.min,
        most=bounds.max,
        drops_missing=bounds.missing == "drop",
    )


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number


def metadata_table(shard: Path, config: FilterConfig) -> dict[str, dict[str, Any]]:
    """By key, the fields that the rules ask for and the shard's `.parquet` has, if there is one.

    Raises:
        DataError: If the table cannot be read or has no column `key`.
    """
    path = shard.with_suffix(".parquet")
    if not config.metadata or not path.is_file():
        return {}
    import pyarrow as pa  # noqa: PLC0415 - only where there is such a table
    import pyarrow.parquet  # noqa: PLC0415 - with it

    try:
        names = pyarrow.parquet.read_schema(path).names
        if "key" not in names:
            message = f"{path}: no column 'key' that names its samples, found {', '.join(names)}"
            raise DataError(message)
        fields = [rule.field for rule in config.metadata if rule.field in names]
        rows = pyarrow.parquet.read_table(path, columns=["key", *fields]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        message = f"{path}: cannot be read ({error}); copy it again, or remove it"
        raise DataError(message) from error
    return {str(row["key"]): row for row in rows}


def metadata_values(
    sample: Sample, table: dict[str, dict[str, Any]], config: FilterConfig
) -> dict[str, Any]:
    """What the rules ask for, from the sample itself, else from the table."""
    row = table.get(sample.key, {})
    return {
        rule.field: sample.metadata.get(rule.field, row.get(rule.field)) for rule in config.metadata
    }
