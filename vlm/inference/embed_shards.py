"""Shards to embeddings: a Parquet file a shard, by any number of processes.

    part-000000.parquet …   id, vector (a unit row), text, metadata (JSON), in the shard's order
    embeddings.json         written when all parts are there; a folder with it is complete

A part is made by one process, appears whole or not at all, and says in its own metadata of which
model and of which bytes it is. So work that was interrupted goes on where it stopped, and the
files do not depend on how many processes made them.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from pydantic import Field

from vlm.config import Config
from vlm.data.dataset import open_reader
from vlm.data.reader import Reader
from vlm.data.remote import RemoteConfig
from vlm.data.samples import Sample
from vlm.distributed import Share
from vlm.errors import DataError
from vlm.files import open_whole, write_text_whole
from vlm.inference.encoder import Encoder
from vlm.preprocess import decode_image

__all__ = ["EmbedConfig", "EmbedResult", "embed_shards"]

DESCRIPTION: Final = "embeddings.json"
FORMAT_VERSION: Final = 1
FACTS: Final = b"vlm"
"""Key in the metadata of a part."""
_BAD: Final = "vlm.bad"
_RUNS_AHEAD: Final = 4

Progress = Callable[[int, int], None]


class EmbedConfig(Config):
    """How images become parts."""

    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored vectors; float16 halves them and moves a cosine by some 1e-4."""
    batch_size: int = Field(64, ge=1)
    """Images of one forward pass."""
    threads: int = Field(4, ge=1)
    """That read and decode ahead of the model."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Of a shard; with more samples that cannot be decoded, it is refused."""
    remote: RemoteConfig = RemoteConfig()


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What a call of `embed_shards` did; samples are those of its share."""

    embedded: int = 0
    bad: int = 0
    """Left out, since their image could not be decoded."""
    skipped: int = 0
    """Of parts that were there already."""
    stopped: bool = False
    """Whether it was asked to stop before its share was done."""
    complete: bool = False
    """Whether the shares of all processes are done."""


class _StoppedError(Exception):
    """Leaves the part that is being written."""


@dataclass(frozen=True, kw_only=True)
class _Bad:
    key: str
    reason: str


_Prepared = tuple[Sample, UInt8[np.ndarray, "channel height width"]]


def embed_shards(
    encoder: Encoder,
    location: str,
    folder: Path,
    *,
    share: Share,
    config: EmbedConfig,
    stopping: Callable[[], bool] = lambda: False,
    progress: Progress = lambda done, total: None,
) -> EmbedResult:
    """Embed the images of this process's share: neighbouring shards, as many as the others'.

    Args:
        encoder: The model.
        location: A dataset: a folder or a URL.
        folder: Where the parts go; all processes must see the same.
        share: Of this process.
        config: How.
        stopping: Asked after each batch; if true, the part in progress is given up.
        progress: Told (done, all) samples of the share after each batch.

    Raises:
        DataError: If the dataset cannot be read, or `folder` holds parts of another model, other
            shards or another dtype.
        StoreError: If a remote store does not answer.
    """
    reader, run_length = open_reader(location, remote=config.remote)
    folder.mkdir(parents=True, exist_ok=True)
    shards = reader.manifest.shards
    own = range(*(n * len(shards) // share.count for n in (share.index, share.index + 1)))
    total = sum(shards[number].num_samples for number in own)
    result = EmbedResult()
    with reader, ThreadPoolExecutor(config.threads) as pool:
        for number in own:
            before, size = result.embedded + result.bad + result.skipped, shards[number].num_samples

            def report(done: int, before: int = before) -> None:
                progress(before + done, total)
                if done < size and stopping():  # noqa: B023 - called in this turn of the loop alone
                    raise _StoppedError

            if _is_there(folder, number, encoder, reader, config):
                result = replace(result, skipped=result.skipped + size)
                report(size)
            else:
                batches = _prepared(encoder, reader, number, run_length, config, pool)
                try:
                    bad = _write_part(folder, number, encoder, reader, config, batches, report)
                except _StoppedError:
                    return replace(result, stopped=True)
                result = replace(
                    result, embedded=result.embedded + size - bad, bad=result.bad + bad
                )
    return replace(result, complete=_finish(folder, encoder, reader, config))


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.parquet"


def _facts(number: int, encoder: Encoder, reader: Reader, config: EmbedConfig) -> dict[str, Any]:
    """What makes a part the one that is wanted."""
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": encoder.fingerprint,
        "shard_sha256": reader.manifest.shards[number].sha256,
        "dtype": config.dtype,
    }


def _is_there(
    folder: Path, number: int, encoder: Encoder, reader: Reader, config: EmbedConfig
) -> bool:
    path = _part(folder, number)
    if not path.is_file():
        return False
    try:
        found = json.loads((pq.read_metadata(path).metadata or {})[FACTS])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        message = f"{path}: no part that this program wrote ({error}); choose another folder"
        raise DataError(message) from error
    wanted = _facts(number, encoder, reader, config)
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        message = (
            f"{path}: made otherwise, {', '.join(differing)} differ; choose another folder, or "
            f"remove this one"
        )
        raise DataError(message)
    return True


def _prepared(
    encoder: Encoder,
    reader: Reader,
    number: int,
    run_length: int,
    config: EmbedConfig,
    pool: ThreadPoolExecutor,
) -> Iterator[list[_Prepared | _Bad]]:
    """The samples of a shard in batches, read and decoded one batch ahead."""
    stop = int(reader.manifest.ends[number])
    start = stop - reader.manifest.shards[number].num_samples

    def prepare(row: int) -> _Prepared | _Bad:
        sample = reader.read(row)
        try:
            image = decode_image(sample.image, min_side=encoder.info.image.decode_side())
        except DataError as error:
            return _Bad(key=sample.key, reason=str(error))
        return sample, encoder.prepare_image(image)

    coming: list[Future[_Prepared | _Bad]] = []
    for first in range(start, stop, config.batch_size):
        rows = range(first, min(first + config.batch_size, stop))
        ahead = np.arange(first, min(rows[-1] + 1 + _RUNS_AHEAD * run_length, stop), run_length)
        reader.expect(ahead)
        arrived, coming = coming, [pool.submit(prepare, row) for row in rows]
        if arrived:
            yield [future.result() for future in arrived]
    yield [future.result() for future in coming]


def _write_part(
    folder: Path,
    number: int,
    encoder: Encoder,
    reader: Reader,
    config: EmbedConfig,
    batches: Iterator[list[_Prepared | _Bad]],
    report: Callable[[int], None],
) -> int:
    """Returns how many samples were bad."""
    value = pa.float32() if config.dtype == "float32" else pa.float16()
    schema = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(value, encoder.dim), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("metadata", pa.string(), nullable=False),
        ],
        metadata={FACTS: json.dumps(_facts(number, encoder, reader, config))},
    )
    done, bad = 0, list[_Bad]()
    size = reader.manifest.shards[number].num_samples
    with open_whole(_part(folder, number)) as file, pq.ParquetWriter(file, schema) as writer:
        for batch in batches:
            bad += [found for found in batch if isinstance(found, _Bad)]
            if len(bad) > config.max_bad_fraction * size:
                message = (
                    f"{reader.manifest.where(number)}: {len(bad)} of its {size} samples cannot be "
                    f"decoded, over max_bad_fraction={config.max_bad_fraction:.1%}. The last was "
                    f"{bad[-1].key!r}: {bad[-1].reason}. Run `vlm data check` on it"
                )
                raise DataError(message)
            good = [found for found in batch if not isinstance(found, _Bad)]
            if good:
                writer.write_batch(_rows(encoder, good, schema))
            done += len(batch)
            report(done)
        writer.add_key_value_metadata({_BAD: json.dumps({b.key: b.reason for b in bad})})
    return len(bad)


def _rows(encoder: Encoder, good: list[_Prepared], schema: pa.Schema) -> pa.RecordBatch:
    vectors = encoder.encode_pixels(np.stack([pixels for _, pixels in good]))
    vector_type = schema.field("vector").type
    flat = pa.array(vectors.ravel().astype(vector_type.value_type.to_pandas_dtype()))
    samples = [sample for sample, _ in good]
    columns = [
        pa.array([sample.key for sample in samples]),
        pa.FixedSizeListArray.from_arrays(flat, type=vector_type),
        pa.array([sample.text for sample in samples]),
        pa.array([json.dumps(sample.metadata, ensure_ascii=False) for sample in samples]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _finish(folder: Path, encoder: Encoder, reader: Reader, config: EmbedConfig) -> bool:
    """Describe the whole, if all parts are there; whoever comes last writes the same."""
    shards = reader.manifest.shards
    if not all(_is_there(folder, n, encoder, reader, config) for n in range(len(shards))):
        return False
    rows = sum(pq.read_metadata(_part(folder, n)).num_rows for n in range(len(shards)))
    info = {
        "format_version": FORMAT_VERSION,
        "bundle": encoder.info.name,
        "fingerprint": encoder.fingerprint,
        "dataset": reader.fingerprint,
        "dim": encoder.dim,
        "dtype": config.dtype,
        "num_rows": rows,
        "num_bad": reader.num_samples - rows,
        "parts": [_part(folder, n).name for n in range(len(shards))],
    }
    write_text_whole(folder / DESCRIPTION, json.dumps(info, indent=2) + "\n")
    return True
