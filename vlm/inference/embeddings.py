"""Reading what `embed_shards` wrote."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from vlm.config import Config, validate_config
from vlm.errors import ConfigError, DataError
from vlm.inference.embed_shards import DESCRIPTION, FORMAT_VERSION

__all__ = [
    "EmbeddedRows",
    "EmbeddingsInfo",
    "holds_embeddings",
    "iterate_embeddings",
    "read_embeddings_info",
]


class EmbeddingsInfo(Config):
    """The content of `embeddings.json`."""

    format_version: int
    bundle: str
    """Name of the model."""
    fingerprint: str
    """Of the model; embeddings of equal fingerprints may be compared, others never."""
    dataset: str
    """Fingerprint of the dataset."""
    dim: int
    dtype: Literal["float32", "float16"]
    num_rows: int
    num_bad: int
    """Samples that could not be decoded and have no row."""
    parts: list[str]


@dataclass(frozen=True, kw_only=True)
class EmbeddedRows:
    """Some rows of a part."""

    ids: list[str]
    vectors: Float32[np.ndarray, "row dim"]
    """Unit rows."""
    texts: list[str]
    metadata: list[dict[str, Any]]


def holds_embeddings(folder: Path) -> bool:
    """Whether a folder is what `vlm embed` writes, complete or not."""
    return (folder / DESCRIPTION).is_file() or any(folder.glob("part-*.parquet"))


def read_embeddings_info(folder: Path) -> EmbeddingsInfo:
    """The description of a complete set of embeddings.

    Raises:
        DataError: If it is not complete, or of another format.
    """
    path = folder / DESCRIPTION
    try:
        info = validate_config(EmbeddingsInfo, json.loads(path.read_text()), source=str(path))
    except FileNotFoundError as error:
        message = f"{folder}: not complete yet; run `vlm embed` with all its shares to the end"
        raise DataError(message) from error
    except (OSError, ValueError, ConfigError) as error:
        message = f"{path}: cannot be read ({error})"
        raise DataError(message) from error
    if info.format_version != FORMAT_VERSION:
        message = f"{path}: format version {info.format_version}, this reads {FORMAT_VERSION}"
        raise DataError(message)
    return info


def iterate_embeddings(folder: Path, *, fingerprint: str, chunk: int) -> Iterator[EmbeddedRows]:
    """All rows, part by part, as float32 unit rows.

    Args:
        folder: What `vlm embed` wrote.
        fingerprint: Of the model that they must be of.
        chunk: Most rows at a time.

    Raises:
        DataError: If they are not complete, of another model, or damaged.
    """
    info = read_embeddings_info(folder)
    if info.fingerprint != fingerprint:
        message = (
            f"{folder}: embeddings of model {info.fingerprint[:12]} ({info.bundle}), and "
            f"{fingerprint[:12]} is asked for; give its bundle, or embed again"
        )
        raise DataError(message)
    for name in info.parts:
        try:
            with pq.ParquetFile(folder / name) as file:
                for batch in file.iter_batches(batch_size=chunk):
                    yield _rows(batch, info.dim)
        except (OSError, pa.ArrowException) as error:
            message = f"{folder / name}: cannot be read ({error}); remove it and embed again"
            raise DataError(message) from error


def _rows(batch: pa.RecordBatch, dim: int) -> EmbeddedRows:
    flat = batch.column("vector").flatten().to_numpy(zero_copy_only=False)
    vectors = flat.astype(np.float32).reshape(-1, dim)
    return EmbeddedRows(
        ids=batch.column("id").to_pylist(),
        vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),  # float16 rounds
        texts=batch.column("text").to_pylist(),
        metadata=[json.loads(text) for text in batch.column("metadata").to_pylist()],
    )
