"""The training stream: global steps in, batches of this rank out, prepared ahead of time.

A thread pool prepares whole batches: reading, decoding and resizing release the interpreter lock.
What a step contains depends only on the plan, the seed and the step, never on threads or timing.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import Field

from vlm.config import Config
from vlm.data.captions import CaptionConfig, choose_caption
from vlm.data.plan import Plan
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


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A decoded sample."""

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
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self._reader = reader
        self._plan = plan
        self._config = config
        self._prepare_image = prepare_image
        self._tokenize = tokenize
        self._rank = rank
        self._size = size
        self._cache: dict[int, _Prepared] = {}
        self._cached_bytes = 0
        self._lock = Lock()

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Batches of steps `start_step` to `stop_step - 1`, in order.

        Starting later costs nothing for what is skipped.

        Raises:
            DataError: If a sample cannot be read or decoded; the message names it.
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
        prepared = [self._prepared(int(row)) for row in rows]
        sample_ids = self._reader.manifest.sample_ids[rows]
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

    def _prepared(self, row: int) -> _Prepared:
        found = self._cache.get(row)
        if found is not None:
            return found
        sample = self._reader.read(row)
        try:
            image = self._prepare_image(sample.image)
        except DataError as error:
            shard, _ = self._reader.manifest.locate(row)
            name = self._reader.manifest.shards[shard].name
            message = f"{self._reader.manifest.folder / name}: sample {sample.key!r}: {error}"
            raise DataError(message) from error
        prepared = _Prepared(
            image=image,
            # The encoded file is not needed again.
            sample=Sample(key=sample.key, image=b"", text=sample.text, metadata=sample.metadata),
            group_id=group_id(sample, self._config.group_field)
            if self._config.group_field is not None
            else int(self._reader.manifest.sample_ids[row]),
        )
        with self._lock:
            if self._cached_bytes + image.nbytes <= self._config.cache_bytes:
                self._cached_bytes += image.nbytes
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
