"""Pairs from a table: CSV, TSV, JSON lines or Parquet."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.json
import pyarrow.parquet

from vlm.data.samples import Sample
from vlm.data.sources.protocol import BadSample
from vlm.errors import DataError

__all__ = ["TABLE_SUFFIXES", "TableSource", "open_table"]

TABLE_SUFFIXES: Final = (".csv", ".tsv", ".jsonl", ".parquet")
_IMAGE_COLUMNS: Final = ("image", "filepath", "file", "path", "image_path")
_CAPTION_COLUMNS: Final = ("caption", "text", "title")
_ROWS_AT_ONCE: Final = 64
_BLOCK_ROWS: Final = 1000


@dataclass(frozen=True, kw_only=True)
class TableSource:
    """One sample a row; columns other than image and caption become its metadata."""

    path: Path
    blocks: Path
    """Where rows are read from: the Parquet file itself, or the Arrow file made of another."""
    num_rows: int
    image_column: str
    caption_column: str

    needs_text: ClassVar[bool] = True

    def __len__(self) -> int:
        return self.num_rows

    def facts(self) -> dict[str, Any]:
        status = self.path.stat()
        return {
            "kind": "table",
            "path": str(self.path.resolve()),
            "samples": self.num_rows,
            "size_bytes": status.st_size,
            "modified_ns": status.st_mtime_ns,
            "image_column": self.image_column,
            "caption_column": self.caption_column,
        }

    def where(self, row: int) -> str:
        return f"{self.path}: row {row}"

    def read(self, start: int, stop: int) -> Iterator[Sample | BadSample]:
        digits = len(str(self.num_rows))
        try:
            for row, values in self._rows(start, stop):
                yield self._sample(f"{row:0{digits}d}", values)
        except (OSError, pa.ArrowException) as error:
            message = f"{self.path}: cannot be read at rows {start} to {stop} ({error})"
            raise DataError(message) from error

    def _rows(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        batches = _parquet_batches if self.blocks == self.path else _arrow_batches
        for first, batch in batches(self.blocks, start, stop):
            low, high = max(start - first, 0), min(stop - first, batch.num_rows)
            if low < high:
                yield from enumerate(batch.slice(low, high - low).to_pylist(), first + low)

    def _sample(self, key: str, values: dict[str, Any]) -> Sample | BadSample:
        image, caption = values.pop(self.image_column), values.pop(self.caption_column)
        if not isinstance(caption, str) or not caption.strip():
            reason = f"column {self.caption_column!r}: no caption, {caption!r}"
            return BadSample(key=key, reason=reason)
        try:
            data = _image(self.path, image)
        except (OSError, ValueError) as error:
            cause = getattr(error, "strerror", None) or str(error)
            reason = f"column {self.image_column!r}: cannot read image {image!r} ({cause})"
            return BadSample(key=key, reason=reason)
        metadata = {name: value for name, value in values.items() if _is_plain(value)}
        return Sample(key=key, image=data, text=caption.strip(), metadata=metadata)


def open_table(
    path: Path,
    *,
    scratch: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> TableSource:
    """Open a table whose rows shall be read from anywhere.

    Parquet is read by row groups, in which nothing can be found without reading from their start:
    groups of about one shard are best. Other tables are parsed once, in memory, and stored in
    `scratch` as Arrow.

    Args:
        path: The table; image paths in it are relative to its folder.
        scratch: A folder, made if it is needed, that lives as long as the source.
        image_column: Column of image paths, or of the bytes of image files in Parquet; by default
            the first there is of image, filepath, file, path, image_path.
        caption_column: By default the first there is of caption, text, title.

    Raises:
        DataError: If the table cannot be read, or lacks a column.
    """
    try:
        if path.suffix == ".parquet":
            with pa.parquet.ParquetFile(path) as file:
                names, num_rows = list(file.schema_arrow.names), file.metadata.num_rows
        else:
            table = _parsed(path)
            names, num_rows = table.column_names, table.num_rows
    except (OSError, pa.ArrowException) as error:
        message = f"{path}: cannot be read as a table ({error})"
        raise DataError(message) from error
    image_name = _column(path, names, image_column, _IMAGE_COLUMNS, "image")
    caption_name = _column(path, names, caption_column, _CAPTION_COLUMNS, "caption")
    blocks = path
    if path.suffix != ".parquet":
        scratch.mkdir(parents=True, exist_ok=True)
        blocks = scratch / "table.arrow"
        with pa.ipc.new_file(blocks, table.schema) as writer:
            writer.write_table(table, max_chunksize=_BLOCK_ROWS)
    return TableSource(
        path=path,
        blocks=blocks,
        num_rows=num_rows,
        image_column=image_name,
        caption_column=caption_name,
    )


def _parsed(path: Path) -> pa.Table:
    if path.suffix == ".jsonl":
        return pa.json.read_json(path)
    delimiter = "\t" if path.suffix == ".tsv" else ","
    options = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    return pa.csv.read_csv(path, parse_options=options)


def _parquet_batches(path: Path, start: int, stop: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches, with the number of their first row, of the row groups that hold the rows."""
    with pa.parquet.ParquetFile(path) as file:
        end = 0
        for group in range(file.num_row_groups):
            first, end = end, end + file.metadata.row_group(group).num_rows
            if end <= start or first >= stop:
                continue
            # Threads would compete with the other worker processes.
            for batch in file.iter_batches(_ROWS_AT_ONCE, [group], use_threads=False):
                yield first, batch
                first += batch.num_rows
                if first >= stop:
                    return


def _arrow_batches(path: Path, start: int, stop: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as file:
        end = 0
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)  # mapped: nothing is read before its rows are
            first, end = end, end + batch.num_rows
            if end > start and first < stop:
                yield first, batch


def _column(
    path: Path, names: list[str], asked: str | None, usual: tuple[str, ...], what: str
) -> str:
    candidates = usual if asked is None else (asked,)
    for name in candidates:
        if name in names:
            return name
    message = (
        f"{path}: no {what} column, looked for {', '.join(candidates)}; the table has "
        f"{', '.join(names)}. Name it: {what}_column, on the command line --{what}-column"
    )
    raise DataError(message)


def _image(path: Path, value: Any) -> bytes:
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]  # the struct that image datasets in Parquet use
    if isinstance(value, bytes):
        return value
    return (path.parent / str(value)).read_bytes()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, str | int | float | bool)
