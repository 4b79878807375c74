"""A tree of images with one folder a class, as torchvision's ImageFolder reads it."""

from pathlib import Path, PurePosixPath
from typing import Literal

from vlm.config import Config
from vlm.data.sources.folder import open_folder
from vlm.errors import DataError
from vlm.evaluation.datasets.opened import ClassFacts, OpenedDataset, number_of, of_source

__all__ = ["FolderDataset"]


class FolderDataset(Config):
    """Images under `location/CLASS/…`; classes are numbered in the order of their names."""

    type: Literal["folder"] = "folder"
    location: Path

    def open(self) -> OpenedDataset:
        """Find the images.

        Raises:
            DataError: If there are none, or some lie in no folder of a class.
        """
        source = open_folder(self.location)
        bare = [name for name in source.names if "/" not in name]
        if bare:
            message = (
                f"{self.location}: {bare[0]!r} lies in no folder of a class; "
                f"expected {self.location}/CLASS/IMAGE"
            )
            raise DataError(message)
        folders = sorted({PurePosixPath(name).parts[0] for name in source.names})
        numbers = number_of(folders)
        read = of_source(
            source,
            location=str(self.location),
            metadata=lambda sample: {
                **sample.metadata,
                "class": numbers[PurePosixPath(sample.metadata["source"]).parts[0]],
            },
        )
        names = tuple(folder.replace("_", " ").replace("-", " ") for folder in folders)
        return OpenedDataset(
            location=str(self.location),
            count=len(source),
            read=read,
            classes=ClassFacts(class_field="class", names=names),
        )
