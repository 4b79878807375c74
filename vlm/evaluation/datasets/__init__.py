"""Whatever can be evaluated on: shards, folders of classes, tables, CLIP_benchmark's layout."""

from typing import Annotated

from pydantic import Field

from vlm.evaluation.datasets.clip_benchmark import ClipBenchmarkDataset
from vlm.evaluation.datasets.folder import FolderDataset
from vlm.evaluation.datasets.opened import ClassFacts, Item, OpenedDataset
from vlm.evaluation.datasets.shards import ShardsDataset
from vlm.evaluation.datasets.table import TableDataset

__all__ = [
    "ClassFacts",
    "ClipBenchmarkDataset",
    "Dataset",
    "FolderDataset",
    "Item",
    "OpenedDataset",
    "ShardsDataset",
    "TableDataset",
]

Dataset = Annotated[
    ShardsDataset | FolderDataset | TableDataset | ClipBenchmarkDataset,
    Field(discriminator="type"),
]
