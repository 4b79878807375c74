"""The training stream: global steps in, batches of this rank out, prepared ahead of time.

A thread pool prepares whole batches: reading, decoding and resizing release the interpreter lock.
What a step contains depends only on the plan, the seed and the step, never on threads or timing.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.data.captions import CaptionConfig, caption_texts, choose_caption
from vlm.data.labels import label_ids
from vlm.data.mixture import MixturePlan
from vlm.data.quarantine import Quarantine, replacements
from vlm.data.reader import Reader
from vlm.data.samples import Sample, hash_text
from vlm.errors import DataError
from vlm.types import Batch, Tokenize

__all__ = ["Source", "StreamConfig", "TrainStream", "group_id"]

ImageArray = UInt8[np.ndarray, "channel height width"]


class StreamConfig(Config):
    """How samples become batches."""

    captions: CaptionConfig = CaptionConfig()
    group_field: str | None = None
    """Key in a sample's `.json`; samples with equal values are never negatives of each other."""
    label_field: str | None = None
    """Key in a sample's `.json` that holds its labels, one or a list, e.g. its tags; for losses
    that compare samples by them."""
    max_labels: int = Field(16, ge=1)
    """Labels of a sample that are compared; further ones are left out."""
    threads: int = Field(2, ge=1)
    """Threads that prepare batches, on each rank."""
    prefetch: int = Field(4, ge=1)
    """Batches prepared ahead."""
    cache_bytes: int = Field(512 * 2**20, ge=0)
    """Memory a rank may spend on decoded images, so that small datasets are decoded once."""
    run_length: int | None = Field(None, ge=1)
    """Neighbouring samples that one rank reads together; see `plan.py`.

    By default 1 up to a million local samples, 64 beyond and in an object store.
    """
    max_bad_fraction: float = Field(0.01, ge=0, lt=1)
    """Share of samples that may be unusable; they are replaced by others and written down."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of a mixture."""

    name: str
    reader: Reader
    captions: CaptionConfig
    salt: int = 0
    """Tells equal shard names and keys of several sources apart: ids are XORed with it."""


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A decoded sample."""

    image: ImageArray
    sample: Sample
    sample_id: int
    group_id: int
    label_ids: list[int] | None


class TrainStream:
    """Batches of one rank, by global step.

    Args:
        sources: The datasets, in the order of the plan's sources.
        plan: Which rows of which source make up which step.
        config: Groups, threads and cache.
        prepare_image: From an encoded image file to a fixed-size uint8 array.
        stack_images: From such arrays to a batch.
        tokenize: From captions to token ids.
        ledger: Where unusable samples are written down, or none.
        rank: This rank.
        size: Number of ranks.
    """

    def __init__(
        self,
        *,
        sources: Sequence[Source],
        plan: MixturePlan,
        config: StreamConfig,
        prepare_image: Callable[[bytes], ImageArray],
        stack_images: Callable[[list[ImageArray]], UInt8[Tensor, "batch channel height width"]],
        tokenize: Tokenize,
        ledger: Path | None = None,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self._sources = tuple(sources)
        self._plan = plan
        self._config = config
        self._prepare_image = prepare_image
        self._stack_images = stack_images
        self._tokenize = tokenize
        self.quarantine = Quarantine(
            ledger,
            num_samples=sum(source.reader.num_samples for source in sources),
            max_bad_fraction=config.max_bad_fraction,
        )
        self._rank = rank
        self._size = size
        self._cache: dict[tuple[int, int], _Prepared] = {}
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

    def figures(self, step: int) -> dict[str, float]:
        """For the log: bad samples of this rank, and of a mixture the shares so far."""
        counts = self._plan.counts(step)
        shares = {
            f"share/{source.name}": count / max(sum(counts), 1)
            for source, count in zip(self._sources, counts, strict=True)
        }
        return {"quarantined": float(len(self.quarantine)), **(shares if len(shares) > 1 else {})}

    def _batch(self, step: int) -> Batch:
        numbers, rows = self._plan.rank_rows(step, rank=self._rank, size=self._size)
        self._expect(step, numbers, rows)
        visits = [(int(number), int(row)) for number, row in zip(numbers, rows, strict=True)]
        prepared = [self._usable(number, row) for number, row in visits]
        first = step * self._plan.global_batch + self._rank * len(rows)
        captions = [
            choose_caption(
                item.sample,
                self._sources[number].captions,
                # The position on the endless line of samples is unique to this visit.
                np.random.Generator(np.random.Philox(key=[self._plan.seed, first + index])),
            )
            for index, (item, (number, _)) in enumerate(zip(prepared, visits, strict=True))
        ]
        return Batch(
            images=self._stack_images([item.image for item in prepared]),
            token_ids=self._tokenize(captions),
            sample_ids=torch.tensor([item.sample_id for item in prepared], dtype=torch.int64),
            group_ids=torch.tensor([item.group_id for item in prepared], dtype=torch.int64),
            label_ids=None
            if self._config.label_field is None
            else torch.tensor([item.label_ids for item in prepared], dtype=torch.int64),
        )

    def _expect(
        self,
        step: int,
        numbers: Int64[np.ndarray, " batch"],
        rows: Int64[np.ndarray, " batch"],
    ) -> None:
        """Send for what this step needs, and for its part of the next tile's runs.

        All lanes begin new runs at the same step; each step before sends for a share of them, so
        that requests come evenly.
        """
        self._send_for(numbers, rows)
        length = max(plan.run_length for plan in self._plan.plans)
        ahead = step + length
        end = self._plan.end
        if length > 1 and (end is None or (ahead + 1) * self._plan.global_batch <= end):
            numbers, rows = self._plan.rank_rows(ahead, rank=self._rank, size=self._size)
            share = slice(step % length, None, length)
            self._send_for(numbers[share], rows[share])

    def _send_for(
        self, numbers: Int64[np.ndarray, " some"], rows: Int64[np.ndarray, " some"]
    ) -> None:
        for number, source in enumerate(self._sources):
            own = [int(row) for row in rows[numbers == number]]
            missing = [row for row in own if (number, row) not in self._cache]
            source.reader.expect(np.array(missing, dtype=np.int64))

    def _usable(self, number: int, row: int) -> _Prepared:
        """The sample of a row, or of the first usable row of the same source in its place."""
        found = self._cache.get((number, row))
        if found is not None:
            return found
        reader = self._sources[number].reader
        for candidate in self._candidates(number, row):
            if (number, candidate) in self.quarantine:
                continue
            self.quarantine.count_seen()
            try:
                sample = reader.read(candidate)
                caption_texts(sample, self._sources[number].captions)  # that there is one
                image = self._decoded(reader, sample, candidate)
            except DataError as error:
                shard, key = reader.name(candidate)
                several = len(self._sources) > 1
                shard = f"{self._sources[number].name}/{shard}" if several else shard
                self.quarantine.add((number, candidate), shard=shard, key=key, error=error)
                continue
            return self._kept((number, row), self._prepared(number, candidate, sample, image))
        message = f"{reader.manifest.location}: no usable sample was found in place of row {row}"
        raise DataError(message)

    def _candidates(self, number: int, row: int) -> Iterator[int]:
        yield row
        plan = self._plan.plans[number]
        yield from replacements(row, num_samples=plan.num_samples, seed=plan.seed)

    def _decoded(self, reader: Reader, sample: Sample, row: int) -> ImageArray:
        try:
            return self._prepare_image(sample.image)
        except DataError as error:
            message = f"{reader.where(row)}: sample {sample.key!r}: {error}"
            raise DataError(message) from error

    def _prepared(self, number: int, row: int, sample: Sample, image: ImageArray) -> _Prepared:
        source = self._sources[number]
        sample_id = int(source.reader.sample_ids(np.array([row]))[0]) ^ source.salt
        return _Prepared(
            image=image,
            # The encoded file is not needed again.
            sample=Sample(key=sample.key, image=b"", text=sample.text, metadata=sample.metadata),
            sample_id=sample_id,
            group_id=group_id(sample, self._config.group_field)
            if self._config.group_field is not None
            else sample_id,
            label_ids=None
            if self._config.label_field is None
            else label_ids(sample, self._config.label_field, most=self._config.max_labels),
        )

    def _kept(self, visit: tuple[int, int], prepared: _Prepared) -> _Prepared:
        with self._lock:
            if self._cached_bytes + prepared.image.nbytes <= self._config.cache_bytes:
                self._cached_bytes += prepared.image.nbytes
                self._cache[visit] = prepared
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
    return hash_text(str(sample.metadata[field])) >> 1
