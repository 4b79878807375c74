"""What every kind of dataset becomes once it is open: rows of an image with its captions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm.data.samples import Sample
from vlm.data.sources.protocol import BadSample, SampleSource
from vlm.errors import DataError

__all__ = ["ClassFacts", "Item", "OpenedDataset", "bad_sample", "of_source"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image, undecoded, and its captions."""

    key: str
    image: bytes
    texts: tuple[str, ...]
    """At least one; empty only in a dataset of classes without captions."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClassFacts:
    """What a dataset itself knows about its classes."""

    class_field: str
    """Key of the metadata that holds the number of a row's class."""
    names: tuple[str, ...]
    templates: tuple[str, ...] | None = None
    """Prompts with `{}` for the name, if the dataset brings some."""


@dataclass(frozen=True, kw_only=True)
class OpenedDataset:
    """Rows that can be read in any order, by any rank."""

    location: str
    count: int
    read: Callable[[int, int], Iterator[Item]]
    """The rows from a first one to before a last one, in order."""
    classes: ClassFacts | None = None
    close: Callable[[], None] = lambda: None

    def item(self, row: int) -> Item:
        return next(self.read(row, row + 1))


def bad_sample(where: str, key: str, reason: str) -> DataError:
    """The error that tells which sample of an evaluation set cannot be used."""
    message = (
        f"{where}: sample {key!r} {reason}. An evaluation leaves nothing out; mend or remove it"
    )
    return DataError(message)


def of_source(
    source: SampleSource, *, location: str, metadata: Callable[[Sample], dict[str, Any]]
) -> Callable[[int, int], Iterator[Item]]:
    """The rows of one of the sources that `vlm data write` reads."""

    def read(start: int, stop: int) -> Iterator[Item]:
        for sample in source.read(start, stop):
            if isinstance(sample, BadSample):
                raise bad_sample(location, sample.key, sample.reason)
            yield Item(
                key=sample.key,
                image=sample.image,
                texts=(sample.text,),
                metadata=metadata(sample),
            )

    return read


def number_of(names: Sequence[str]) -> dict[str, int]:
    """The number of each class by its name."""
    return {name: number for number, name in enumerate(names)}
