"""The training stream: global steps in, batches of this rank out, prepared ahead of time.

A thread pool prepares whole batches: reading, decoding and resizing release the interpreter lock.
What a step contains depends only on the plan, the seed and the step, never on threads or timing.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import Field

from vlm.config import Config
from vlm.data.captions import CaptionConfig, choose_caption
from vlm.data.plan import Plan
from vlm.data.quarantine import Quarantine, replacements
from vlm.data.reader import Reader
from vlm.data.samples import Sample
from vlm.errors import DataError
from vlm.types import Batch, Tokenize

__all__ = ["StreamConfig", "TrainStream", "group_id"]

ImageArray = UInt8[np.ndarray, "channel height width"]


class StreamConfig(Config):
    """How samples become batches."""

    captions: CaptionConfig = CaptionConfig()
    group_field: str | None = None
    """Key in a sample's `.json`; samples with equal values are never negatives of each other."""
    threads: int = Field(2, ge=1)
    """Threads that prepare batches, on each rank."""
    prefetch: int = Field(4, ge=1)
    """Batches prepared ahead."""
    cache_bytes: int = Field(512 * 2**20, ge=0)
    """Memory a rank may spend on decoded images, so that small datasets are decoded once."""
    run_length: int | None = Field(None, ge=1)
    """Neighbouring samples that one rank reads together; see `plan.py`.

    By default 1 up to a million samples, 64 beyond.
    """
    max_bad_fraction: float = Field(0.01, ge=0, lt=1)
    """Share of samples that may be unusable; they are replaced by others and written down."""


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A decoded sample."""

    row: int
    image: ImageArray
    sample: Sample
    group_id: int


class TrainStream:
    """Batches of one rank, by global step.

    Args:
        reader: The dataset.
        plan: Which rows make up which step.
        config: Captions, groups, threads and cache.
        prepare_image: From an encoded image file to a fixed-size uint8 array.
        tokenize: From captions to token ids.
        ledger: Where unusable samples are written down, or none.
        rank: This rank.
        size: Number of ranks.
    """

    def __init__(
        self,
        *,
        reader: Reader,
        plan: Plan,
        config: StreamConfig,
        prepare_image: Callable[[bytes], ImageArray],
        tokenize: Tokenize,
        ledger: Path | None = None,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self._reader = reader
        self._plan = plan
        self._config = config
        self._prepare_image = prepare_image
        self._tokenize = tokenize
        self.quarantine = Quarantine(
            ledger,
            num_samples=reader.manifest.num_samples,
            max_bad_fraction=config.max_bad_fraction,
        )
        self._rank = rank
        self._size = size
        self._cache: dict[int, _Prepared] = {}
        self._cached_bytes = 0
        self._lock = Lock()

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Batches of steps `start_step` to `stop_step - 1`, in order.

        Starting later costs nothing for what is skipped.

        Raises:
            DataError: If more samples than allowed cannot be read or decoded; the message names
                the last.
        """
        pool = ThreadPoolExecutor(self._config.threads, thread_name_prefix="vlm-stream")
        pending: deque[Future[Batch]] = deque()
        upcoming = iter(range(start_step, stop_step))
        try:
            for step in upcoming:
                pending.append(pool.submit(self._batch, step))
                if len(pending) > self._config.prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, step: int) -> Batch:
        rows = self._plan.rank_rows(step, rank=self._rank, size=self._size)
        prepared = [self._usable(int(row)) for row in rows]
        sample_ids = self._reader.manifest.sample_ids[[item.row for item in prepared]]
        first_row = step * self._plan.global_batch + self._rank * len(rows)
        captions = [
            choose_caption(
                item.sample,
                self._config.captions,
                # The position on the endless line of samples is unique to this visit.
                np.random.Generator(np.random.Philox(key=[self._plan.seed, first_row + index])),
            )
            for index, item in enumerate(prepared)
        ]
        return Batch(
            images=torch.from_numpy(np.stack([item.image for item in prepared])),
            token_ids=self._tokenize(captions),
            sample_ids=torch.from_numpy(np.ascontiguousarray(sample_ids)),
            group_ids=torch.tensor([item.group_id for item in prepared], dtype=torch.int64),
        )

    def _usable(self, row: int) -> _Prepared:
        """The sample of a row, or of the first usable row in its place."""
        found = self._cache.get(row)
        if found is not None:
            return found
        for candidate in self._candidates(row):
            if candidate in self.quarantine:
                continue
            self.quarantine.count_seen()
            try:
                sample = self._reader.read(candidate)
                image = self._decoded(sample, candidate)
            except DataError as error:
                shard, key = self._reader.name(candidate)
                self.quarantine.add(candidate, shard=shard, key=key, error=error)
                continue
            return self._kept(row, self._prepared(candidate, sample, image))
        folder = self._reader.manifest.folder
        message = f"{folder}: no usable sample was found in place of row {row}"
        raise DataError(message)

    def _candidates(self, row: int) -> Iterator[int]:
        yield row
        yield from replacements(
            row, num_samples=self._reader.manifest.num_samples, seed=self._plan.seed
        )

    def _decoded(self, sample: Sample, row: int) -> ImageArray:
        try:
            return self._prepare_image(sample.image)
        except DataError as error:
            shard, _ = self._reader.manifest.locate(row)
            name = self._reader.manifest.shards[shard].name
            message = f"{self._reader.manifest.folder / name}: sample {sample.key!r}: {error}"
            raise DataError(message) from error

    def _prepared(self, row: int, sample: Sample, image: ImageArray) -> _Prepared:
        return _Prepared(
            row=row,
            image=image,
            # The encoded file is not needed again.
            sample=Sample(key=sample.key, image=b"", text=sample.text, metadata=sample.metadata),
            group_id=group_id(sample, self._config.group_field)
            if self._config.group_field is not None
            else int(self._reader.manifest.sample_ids[row]),
        )

    def _kept(self, row: int, prepared: _Prepared) -> _Prepared:
        with self._lock:
            if self._cached_bytes + prepared.image.nbytes <= self._config.cache_bytes:
                self._cached_bytes += prepared.image.nbytes
                self._cache[row] = prepared
        return prepared


def group_id(sample: Sample, field: str) -> int:
    """A 63-bit id of the value that a sample's metadata has under `field`.

    Raises:
        DataError: If the sample has no such field.
    """
    if field not in sample.metadata:
        message = (
            f"sample {sample.key!r}: data.stream.group_field={field!r} is not in its .json, "
            f"which has {', '.join(sorted(sample.metadata)) or 'no keys'}; "
            f"name one of those, or leave group_field out"
        )
        raise DataError(message)
    digest = hashlib.blake2b(str(sample.metadata[field]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
