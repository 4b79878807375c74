"""Micro-batching: many small requests become few forward passes.

No timer: while the model works on one batch, the next one gathers. An idle model starts at once,
a busy one gets full batches, so the wait adapts to the load by itself.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from serving.errors import OverloadedError
from serving.metrics import Metrics

__all__ = ["MicroBatcher"]

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class _Waiting(Generic[ItemT]):
    item: ItemT
    future: "asyncio.Future[np.ndarray]"
    since: float = field(default_factory=time.perf_counter)


class MicroBatcher(Generic[ItemT]):
    """Runs `encode` on batches of what callers bring, one batch at a time.

    Args:
        encode: From items to one row each; runs on the executor.
        executor: The one worker of the device; several batchers may share it.
        max_batch: Most items of one call of `encode`.
        max_waiting: Most items in the queue; a caller that would exceed it is refused.
        tower: What the batches are called in the metrics.
        metrics: Where sizes and times are told.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[ItemT]], np.ndarray],
        *,
        executor: Executor,
        max_batch: int,
        max_waiting: int,
        tower: str = "item",
        metrics: Metrics | None = None,
    ) -> None:
        self._encode = encode
        self._executor = executor
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting[ItemT]] = deque()
        self._worker: asyncio.Task[None] | None = None
        metrics = Metrics() if metrics is None else metrics
        self._queue_items = metrics.queue_items.labels(tower)
        self._batch_items = metrics.batch_items.labels(tower)
        self._wait_seconds = metrics.stages.labels("wait")
        self._model_seconds = metrics.stages.labels(tower)

    async def rows(self, items: Sequence[ItemT]) -> np.ndarray:
        """One row an item, in order.

        A caller that is cancelled takes its items out of the queue; what the model raises reaches
        those of its batch and nobody else.

        Raises:
            OverloadedError: If the queue has no room for all of them.
        """
        if not self._has_room(len(items)):
            message = "too many requests are waiting for the model; try again in a second"
            raise OverloadedError(message)
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._waiting.extend(map(_Waiting, items, futures))
        self._queue_items.inc(len(items))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return np.stack(await asyncio.gather(*futures))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            items = [waiting.item for waiting in batch]
            try:
                rows = await loop.run_in_executor(self._executor, self._encoded, items)
            except Exception as error:  # noqa: BLE001 - handed to everyone who waits for this batch
                for waiting in batch:
                    if not waiting.future.done():
                        waiting.future.set_exception(error)
                continue
            for waiting, row in zip(batch, rows, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(row)

    def _encoded(self, items: Sequence[ItemT]) -> np.ndarray:
        with self._model_seconds.time():
            rows = self._encode(items)
        if len(rows) != len(items):
            message = f"the model returned {len(rows)} rows for {len(items)} items"
            raise RuntimeError(message)
        return rows

    def _has_room(self, count: int) -> bool:
        if len(self._waiting) + count > self._max_waiting:
            before = len(self._waiting)
            self._waiting = deque(w for w in self._waiting if not w.future.cancelled())
            self._queue_items.dec(before - len(self._waiting))
        # One request may exceed the queue when nothing else waits, or it could never be served.
        return not self._waiting or len(self._waiting) + count <= self._max_waiting

    def _next_batch(self) -> list[_Waiting[ItemT]]:
        """Up to `max_batch` items whose callers still wait."""
        now = time.perf_counter()
        batch: list[_Waiting[ItemT]] = []
        while self._waiting and len(batch) < self._max_batch:
            waiting = self._waiting.popleft()
            self._queue_items.dec()
            if not waiting.future.cancelled():
                batch.append(waiting)
                self._wait_seconds.observe(now - waiting.since)
        if batch:
            self._batch_items.observe(len(batch))
        return batch
