"""Micro-batching: many small requests become few forward passes.

No timer: while the model works on one batch, the next one gathers. An idle model starts as soon as
all is read that has arrived, a busy one gets full batches, so the wait adapts to the load by
itself. Of several streams each takes its share of what is there. (Waiting an eighth to a half of a
batch's time for clients that were just answered to come again made nothing faster.)

A lone item may have all cores. Of images one keeps them as busy as two do, so that what comes
meanwhile waits, or evenly spaced requests at half load fall into step side by side and take twice
as long. Of texts two at once get through faster: one has all cores only after a while in which
each had the model for itself.

Clients take turns, an item each, so that who asks for much waits longer than who asks for little. A
batch holds items of like cost, for they are all made as long as the longest.
"""

import asyncio
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import numpy as np

from serving.context import CLIENT
from serving.errors import OverloadedError
from serving.metrics import Metrics

__all__ = ["MicroBatcher"]

ItemT = TypeVar("ItemT")
_LIKE: Final = 1.5
_QUIET: Final = 2
"""Turns of the event loop in a row without another item: from socket to queue it takes two."""
_CALM: Final = 8
"""Batches in a row that had the model for themselves, after which a lone item has all cores."""


@dataclass(frozen=True)
class _Waiting(Generic[ItemT]):
    item: ItemT
    future: "asyncio.Future[np.ndarray]"
    since: float = field(default_factory=time.perf_counter)


class MicroBatcher(Generic[ItemT]):
    """Runs `encode` on batches of what callers bring, a batch for each stream at a time.

    Args:
        encode: From items, and whether nothing else is computed meanwhile, to one row each; runs on
            the executor.
        executor: Has a thread for each stream; several batchers may share it.
        streams: Batches at once.
        max_batch: Most items of one call of `encode`.
        max_waiting: Most items in the queue; a caller that would exceed it is refused.
        cost: Of an item, over 0; in a batch none costs over 1.5 times what another does.
        heavy: Whether one item keeps all cores busy: what comes while a lone one is computed waits.
        tower: What the batches are called in the metrics.
        metrics: Where sizes and times are told.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[ItemT], bool], np.ndarray],
        *,
        executor: Executor,
        streams: int = 1,
        max_batch: int,
        max_waiting: int,
        cost: Callable[[ItemT], int] = lambda item: 1,
        heavy: bool = False,
        tower: str = "item",
        metrics: Metrics | None = None,
    ) -> None:
        self._encode = encode
        self._executor = executor
        self._streams = streams
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._cost = cost
        self._heavy = heavy
        self._queues: OrderedDict[str, deque[_Waiting[ItemT]]] = OrderedDict()
        self._workers: set[asyncio.Task[None] | None] = set()
        self._computing = 0
        self._alone = False
        self._calm = _CALM
        self._began: dict[int, float] = {}
        metrics = Metrics() if metrics is None else metrics
        self._queue_items = metrics.queue_items.labels(tower)
        self._batch_items = metrics.batch_items.labels(tower)
        self._wait_seconds = metrics.stages.labels("wait")
        self._model_seconds = metrics.stages.labels(tower)

    @property
    def waiting(self) -> int:
        """Items in the queue now."""
        return sum(map(len, self._queues.values()))

    @property
    def computing_seconds(self) -> float:
        """How long the longest of the batches that are being computed has been; 0 if none is."""
        now = time.perf_counter()
        return max((now - began for began in list(self._began.values())), default=0.0)

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
        self._queues.setdefault(CLIENT.get(), deque()).extend(map(_Waiting, items, futures))
        self._queue_items.inc(len(items))
        if not (self._heavy and self._alone):
            self._begin()
        if len(futures) == 1:  # most requests bring one, and gathering costs
            return (await futures[0])[None]
        try:
            return np.stack(await asyncio.gather(*futures))
        finally:  # where one has failed, the others are nobody's
            for future in futures:
                future.cancel()

    def _begin(self) -> None:
        """Put the streams that are free to work, as many as there are items."""
        loop = asyncio.get_running_loop()
        for _ in range(min(self.waiting, self._streams - len(self._workers))):
            self._workers.add(loop.create_task(self._work()))

    async def _work(self) -> None:
        try:
            while batch := await self._gathered():
                is_lone = len(batch) == 1 and not self._computing and not self.waiting
                alone = is_lone and (self._heavy or self._calm >= _CALM)
                self._alone |= alone
                self._computing += len(batch)
                await self._answer(batch, alone=alone)
                self._computing -= len(batch)
                self._calm = 0 if self._computing or self.waiting else self._calm + 1
                if alone:
                    self._alone = False
                    if self.waiting > 1:
                        self._begin()
        finally:  # in the very step that found nothing more, or what comes next would find nobody
            self._workers.discard(asyncio.current_task())

    async def _answer(self, batch: "list[_Waiting[ItemT]]", *, alone: bool) -> None:
        loop = asyncio.get_running_loop()
        items = [waiting.item for waiting in batch]
        try:
            rows = await loop.run_in_executor(self._executor, self._encoded, items, alone)
        except Exception as error:  # noqa: BLE001 - handed to everyone who waits for this batch
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        for waiting, row in zip(batch, rows, strict=True):
            if not waiting.future.done():
                waiting.future.set_result(row)

    def _encoded(self, items: Sequence[ItemT], alone: bool) -> np.ndarray:
        thread = threading.get_ident()
        self._began[thread] = time.perf_counter()
        try:
            with self._model_seconds.time():
                rows = self._encode(items, alone)
        except StopIteration as error:  # which no future can hold: nobody would hear of it
            message = "the model ended an iteration that is not its own"
            raise RuntimeError(message) from error
        finally:
            del self._began[thread]
        if len(rows) != len(items):
            message = f"the model returned {len(rows)} rows for {len(items)} items"
            raise RuntimeError(message)
        return rows

    def _has_room(self, count: int) -> bool:
        if self.waiting + count > self._max_waiting:
            self._forget_cancelled()
        # One request may exceed the queue when nothing else waits, or it could never be served.
        return not self._queues or self.waiting + count <= self._max_waiting

    def _forget_cancelled(self) -> None:
        before = self.waiting
        for client, queue in list(self._queues.items()):
            alive = deque(w for w in queue if not w.future.cancelled())
            if alive:
                self._queues[client] = alive
            else:
                del self._queues[client]
        self._queue_items.dec(before - self.waiting)

    async def _gathered(self) -> "list[_Waiting[ItemT]]":
        """The next batch, once all is in the queue that has arrived at the server.

        Clients that were answered at once come again at once: a batch that began with the first of
        them would be one of one.
        """
        quiet, seen = 0, self.waiting
        while quiet < _QUIET and 0 < seen < self._max_batch:
            await asyncio.sleep(0)
            quiet = quiet + 1 if self.waiting == seen else 0
            seen = self.waiting
        return self._next_batch()

    def _next_batch(self) -> list[_Waiting[ItemT]]:
        """Items of like cost whose callers still wait, clients in turn: a stream's share of them.

        That is of those that are being computed as well, and at most `max_batch`.
        """
        self._forget_cancelled()
        batch: list[_Waiting[ItemT]] = []
        share = math.ceil((self.waiting + self._computing) / self._streams)
        now = time.perf_counter()
        for waiting in self._turns():
            batch.append(waiting)
            self._wait_seconds.observe(now - waiting.since)
            if len(batch) == min(share, self._max_batch):
                break
        if batch:
            self._queue_items.dec(len(batch))
            self._batch_items.observe(len(batch))
        return batch

    def _turns(self) -> Iterator[_Waiting[ItemT]]:
        """Take items out, one a client and turn, whose costs are alike.

        Who has had its turn goes to the end of the line, so the next batch begins with another.
        """
        least, most = math.inf, 0.0
        found = True
        while found:
            found = False
            for client in list(self._queues):
                queue = self._queues[client]
                waiting = self._taken(queue, at_least=most / _LIKE, at_most=least * _LIKE)
                if waiting is None:
                    continue
                found = True
                cost = self._cost(waiting.item)
                least, most = min(least, cost), max(most, cost)
                self._queues.move_to_end(client)
                if not queue:
                    del self._queues[client]
                yield waiting

    def _taken(
        self, queue: "deque[_Waiting[ItemT]]", *, at_least: float, at_most: float
    ) -> _Waiting[ItemT] | None:
        """The first item of a cost between those, taken out; None if there is none."""
        for place, waiting in enumerate(queue):
            if at_least <= self._cost(waiting.item) <= at_most:
                del queue[place]
                return waiting
        return None
