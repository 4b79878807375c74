"""A CSV, TSV, JSON-lines or Parquet table with a column of images and one of captions."""

import tempfile
from pathlib import Path
from typing import Literal

from vlm.config import Config
from vlm.data.sources.table import open_table
from vlm.evaluation.datasets.opened import OpenedDataset, of_source

__all__ = ["TableDataset"]


class TableDataset(Config):
    """One pair a row; further columns are metadata, such as a class or a group."""

    type: Literal["table"] = "table"
    location: Path
    """The table; image paths in it are relative to its folder."""
    image_column: str | None = None
    """By default the first there is of image, filepath, file, path, image_path."""
    caption_column: str | None = None
    """By default the first there is of caption, text, title."""

    def open(self) -> OpenedDataset:
        """Parse the table.

        Raises:
            DataError: If it cannot be read, or lacks a column.
        """
        scratch = tempfile.TemporaryDirectory(prefix="vlm-table-")
        try:
            source = open_table(
                self.location,
                scratch=Path(scratch.name),
                image_column=self.image_column,
                caption_column=self.caption_column,
            )
        except BaseException:
            scratch.cleanup()
            raise
        read = of_source(
            source, location=str(self.location), metadata=lambda sample: sample.metadata
        )
        return OpenedDataset(
            location=str(self.location), count=len(source), read=read, close=scratch.cleanup
        )
