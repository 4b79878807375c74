"""Pairs from a table: CSV, TSV, JSON lines or Parquet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from vlm.data.samples import Sample
from vlm.errors import DataError

__all__ = ["TABLE_SUFFIXES", "read_table"]

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_IMAGE_COLUMNS = ("image", "filepath", "file", "path", "image_path")
_CAPTION_COLUMNS = ("caption", "text", "title")


def read_table(
    path: Path, *, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[Sample]:
    """One sample a row; the other columns become its metadata.

    Args:
        path: The table; image paths in it are relative to its folder.
        image_column: Column of image paths, or of the bytes of image files in Parquet; by default
            the first there is of image, filepath, file, path, image_path.
        caption_column: By default the first there is of caption, text, title.

    Raises:
        DataError: If the table cannot be read, lacks a column, or names an image that is not
            there; with row and column.
    """
    table = _load(path)
    image_name = _column(path, table, image_column, _IMAGE_COLUMNS, "image")
    caption_name = _column(path, table, caption_column, _CAPTION_COLUMNS, "caption")
    digits = len(str(table.num_rows))
    row = 0
    for batch in table.to_batches(max_chunksize=1000):
        for values in batch.to_pylist():
            image, caption = values.pop(image_name), values.pop(caption_name)
            if not isinstance(caption, str) or not caption.strip():
                message = f"{path}: row {row}, column {caption_name!r}: no caption, {caption!r}"
                raise DataError(message)
            metadata = {key: value for key, value in values.items() if _is_plain(value)}
            yield Sample(
                key=f"{row:0{digits}d}",
                image=_image(path, row, image_name, image),
                text=caption.strip(),
                metadata=metadata,
            )
            row += 1


def _load(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        if path.suffix == ".jsonl":
            return pyarrow.json.read_json(path)
        delimiter = "\t" if path.suffix == ".tsv" else ","
        options = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        return pyarrow.csv.read_csv(path, parse_options=options)
    except (OSError, pa.ArrowException) as error:
        message = f"{path}: cannot be read as a table ({error})"
        raise DataError(message) from error


def _column(
    path: Path, table: pa.Table, asked: str | None, usual: tuple[str, ...], what: str
) -> str:
    names: list[str] = table.column_names
    candidates = usual if asked is None else (asked,)
    for name in candidates:
        if name in names:
            return name
    message = (
        f"{path}: no {what} column, looked for {', '.join(candidates)}; the table has "
        f"{', '.join(names)}. Name it with --{what}-column"
    )
    raise DataError(message)


def _image(path: Path, row: int, column: str, value: Any) -> bytes:
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]  # the struct that image datasets in Parquet use
    if isinstance(value, bytes):
        return value
    try:
        return (path.parent / str(value)).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"{path}: row {row}, column {column!r}: cannot read image {value!r} ({reason})"
        raise DataError(message) from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, str | int | float | bool)
