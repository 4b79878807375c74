"""What every source of pairs gives to the writer of shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vlm.data.samples import Sample

__all__ = ["BadSample", "SampleSource"]


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A row of a source that cannot become a sample."""

    key: str
    reason: str


@runtime_checkable
class SampleSource(Protocol):
    """Pairs by row number, readable from any row on; picklable, for it is sent to workers."""

    @property
    def needs_text(self) -> bool:
        """Whether a sample without text is bad; of shards, the metadata may hold the caption."""
        ...

    def __len__(self) -> int:
        """Number of rows, bad ones included."""
        ...

    def facts(self) -> dict[str, Any]:
        """Plain JSON that changes when the source does: kind, path, length, checksums or times."""
        ...

    def where(self, row: int) -> str:
        """The file, or the file and row, for a message."""
        ...

    def read(self, start: int, stop: int) -> Iterator[Sample | BadSample]:
        """Rows `start` to `stop`, in order; keys are unique within the call.

        Raises:
            DataError: If the source itself cannot be read.
        """
        ...
