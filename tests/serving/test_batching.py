import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from serving.batching import MicroBatcher
from serving.context import CLIENT
from serving.errors import OverloadedError


class GatedEncoder:
    """Doubles numbers; waits at a gate, and remembers every batch."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.batches: list[list[int]] = []
        self.alone: list[bool] = []

    def __call__(self, items: Sequence[int], alone: bool) -> np.ndarray:
        self.batches.append(list(items))
        self.alone.append(alone)
        assert self.gate.wait(30)
        if -1 in items:
            message = "poison"
            raise ValueError(message)
        return np.array([[2 * item] for item in items], np.float32)


def batcher_of(
    encode: GatedEncoder,
    *,
    max_batch: int = 4,
    max_waiting: int = 8,
    cost: Callable[[int], int] = lambda item: 1,
    streams: int = 1,
    heavy: bool = False,
) -> MicroBatcher[int]:
    return MicroBatcher(
        encode,
        executor=ThreadPoolExecutor(streams),
        streams=streams,
        max_batch=max_batch,
        max_waiting=max_waiting,
        cost=cost,
        heavy=heavy,
    )


async def a_batch_runs(encode: GatedEncoder, count: int = 1) -> None:
    while len(encode.batches) < count:
        await asyncio.sleep(0.001)


def test_every_caller_gets_its_own_rows_in_order() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        encode.gate.set()
        batcher = batcher_of(encode, max_waiting=100)
        answers = await asyncio.gather(*(batcher.rows([n, n + 100]) for n in range(20)))
        for number, rows in enumerate(answers):
            assert rows.tolist() == [[2 * number], [2 * number + 200]]

    asyncio.run(scenario())


def test_what_arrives_while_the_model_works_becomes_one_batch() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        batcher = batcher_of(encode)
        first = asyncio.create_task(batcher.rows([0]))
        await a_batch_runs(encode)
        others = [asyncio.create_task(batcher.rows([n])) for n in range(1, 6)]
        await asyncio.sleep(0)
        encode.gate.set()
        await asyncio.gather(first, *others)
        assert encode.batches == [[0], [1, 2, 3, 4], [5]]

    asyncio.run(scenario())


def test_a_full_queue_refuses_at_once_and_serves_the_others() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        batcher = batcher_of(encode, max_waiting=2)
        running = asyncio.create_task(batcher.rows([0]))
        await a_batch_runs(encode)
        waiting = asyncio.create_task(batcher.rows([1, 2]))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="too many requests"):
            await batcher.rows([3])
        encode.gate.set()
        assert (await running).tolist() == [[0]]
        assert (await waiting).tolist() == [[2], [4]]

    asyncio.run(scenario())


def test_a_request_larger_than_the_queue_is_served_when_nothing_else_waits() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        encode.gate.set()
        rows = await batcher_of(encode, max_waiting=2).rows([1, 2, 3, 4, 5])
        assert rows[:, 0].tolist() == [2, 4, 6, 8, 10]

    asyncio.run(scenario())


def test_an_error_reaches_its_own_batch_and_the_worker_goes_on() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        batcher = batcher_of(encode, max_batch=1)
        poisoned = asyncio.create_task(batcher.rows([-1]))
        await a_batch_runs(encode)
        sound = asyncio.create_task(batcher.rows([7]))
        await asyncio.sleep(0)
        encode.gate.set()
        with pytest.raises(ValueError, match="poison"):
            await poisoned
        assert (await sound).tolist() == [[14]]

    asyncio.run(scenario())


def test_a_cancelled_caller_leaves_the_queue_and_frees_its_place() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        batcher = batcher_of(encode, max_waiting=1)
        running = asyncio.create_task(batcher.rows([0]))
        await a_batch_runs(encode)
        gone = asyncio.create_task(batcher.rows([1]))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        patient = asyncio.create_task(batcher.rows([2]))
        await asyncio.sleep(0)
        encode.gate.set()
        await asyncio.gather(running, patient)
        assert encode.batches == [[0], [2]]

    asyncio.run(scenario())


def test_a_model_that_loses_rows_is_an_error_and_not_a_wait_for_ever() -> None:
    async def scenario() -> None:
        batcher: MicroBatcher[int] = MicroBatcher(
            lambda items, alone: np.zeros((len(items) - 1, 1), np.float32),
            executor=ThreadPoolExecutor(1),
            max_batch=4,
            max_waiting=4,
        )
        with pytest.raises(RuntimeError, match="1 rows for 2 items"):
            await asyncio.wait_for(batcher.rows([1, 2]), timeout=30)

    asyncio.run(scenario())


def test_clients_take_turns_however_much_one_asks_for() -> None:
    async def ask(batcher: MicroBatcher[int], client: str, items: list[int]) -> None:
        CLIENT.set(client)
        await batcher.rows(items)

    async def scenario() -> None:
        encode = GatedEncoder()
        batcher = batcher_of(encode, max_waiting=100)
        running = asyncio.create_task(ask(batcher, "greedy", [0]))
        await a_batch_runs(encode)
        tasks = [
            asyncio.create_task(ask(batcher, client, items))
            for client, items in (("greedy", list(range(1, 8))), ("b", [20, 21]), ("c", [30]))
        ]
        await asyncio.sleep(0)
        encode.gate.set()
        await asyncio.gather(running, *tasks)
        assert encode.batches == [[0], [1, 20, 30, 2], [21, 3, 4, 5], [6, 7]]

    asyncio.run(scenario())


def test_a_batch_holds_items_of_like_cost_and_nobody_waits_for_ever() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        batcher = batcher_of(encode, max_batch=4, max_waiting=100, cost=lambda item: item // 100)
        running = asyncio.create_task(batcher.rows([0]))
        await a_batch_runs(encode)
        mixed = asyncio.create_task(batcher.rows([1, 100, 2, 101, 3]))
        await asyncio.sleep(0)
        encode.gate.set()
        assert (await mixed)[:, 0].tolist() == [2, 200, 4, 202, 6]
        await running
        assert encode.batches == [[0], [1, 2, 3], [100, 101]]
        assert batcher.waiting == 0

    asyncio.run(scenario())


def test_costs_up_to_half_as_much_again_share_a_batch() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        batcher = batcher_of(encode, max_batch=8, max_waiting=100, cost=lambda item: item)
        running = asyncio.create_task(batcher.rows([1]))
        await a_batch_runs(encode)
        mixed = asyncio.create_task(batcher.rows([20, 30, 16, 31, 21, 47]))
        await asyncio.sleep(0)
        encode.gate.set()
        await asyncio.gather(running, mixed)
        assert encode.batches == [[1], [20, 30, 21], [16], [31], [47]]

    asyncio.run(scenario())


def test_streams_compute_at_once_and_each_takes_its_share() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        batcher = batcher_of(encode, max_batch=32, max_waiting=100, streams=3)
        rows = asyncio.create_task(batcher.rows(list(range(8))))
        await a_batch_runs(encode, 3)  # none of them has ended
        later = asyncio.create_task(batcher.rows([8, 9, 10, 11]))
        await asyncio.sleep(0)
        encode.gate.set()
        assert (await rows)[:, 0].tolist() == [2 * n for n in range(8)]
        await later
        sizes = sorted(map(len, encode.batches[:3]))
        assert sizes == [2, 3, 3]
        assert sorted(item for batch in encode.batches for item in batch) == list(range(12))

    asyncio.run(scenario())


def test_what_comes_while_a_lone_heavy_item_is_computed_waits_for_it() -> None:
    """Side by side each took twice as long, and evenly spaced images stayed in that step."""

    async def scenario() -> None:
        encode = GatedEncoder()
        batcher = batcher_of(encode, streams=2, heavy=True)
        lone = asyncio.create_task(batcher.rows([0]))
        await a_batch_runs(encode)
        later = [asyncio.create_task(batcher.rows([n])) for n in (1, 2, 3)]
        await asyncio.sleep(0.05)
        assert encode.batches == [[0]]
        encode.gate.set()
        await asyncio.gather(lone, *later)
        assert sorted(encode.batches[1:]) == [[1, 2], [3]]
        for number in (4, 5):
            await batcher.rows([number])
        # The gate is open: the first of the two may have ended before the other began.
        assert (encode.alone[:2], encode.alone[3:]) == ([True, False], [True, True])

    asyncio.run(scenario())


def test_a_light_item_has_all_cores_only_after_a_while_of_calm() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        batcher = batcher_of(encode, streams=2)
        lone = asyncio.create_task(batcher.rows([0]))
        await a_batch_runs(encode)
        beside = asyncio.create_task(batcher.rows([1]))
        await a_batch_runs(encode, 2)  # which the first one does not hold up
        assert encode.alone == [True, False]
        encode.gate.set()
        await asyncio.gather(lone, beside)
        for number in range(10):
            await batcher.rows([number])
        assert encode.alone.index(True, 2) in (9, 10)  # of the two first, one may have ended alone
        assert all(encode.alone[10:])

    asyncio.run(scenario())


def test_of_a_caller_whose_first_item_failed_nothing_more_is_computed() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        encode.gate.set()
        batcher = batcher_of(encode, max_batch=1)
        with pytest.raises(ValueError, match="poison"):
            await batcher.rows([-1, 1, 2, 3, 4, 5])
        assert (await batcher.rows([6])).tolist() == [[12]]
        assert len(encode.batches) <= 3

    asyncio.run(scenario())


def test_an_error_that_no_future_can_hold_is_heard_of() -> None:
    """StopIteration was lost, and the stream waited for its batch for ever."""

    def ended(items: Sequence[int], alone: bool) -> np.ndarray:
        raise StopIteration

    async def scenario() -> None:
        batcher: MicroBatcher[int] = MicroBatcher(
            ended, executor=ThreadPoolExecutor(1), max_batch=4, max_waiting=4
        )
        for _ in range(2):
            with pytest.raises(RuntimeError, match="ended an iteration"):
                await asyncio.wait_for(batcher.rows([1]), timeout=30)

    asyncio.run(scenario())


def test_how_long_a_batch_is_computed_is_known_while_it_is() -> None:
    """One stuck stream of two would go unseen by a check that the other one computes."""

    async def scenario() -> None:
        encode = GatedEncoder()
        batcher = batcher_of(encode, streams=2)
        assert batcher.computing_seconds == 0
        stuck = asyncio.create_task(batcher.rows([1]))
        await a_batch_runs(encode)
        while (first := batcher.computing_seconds) == 0:
            await asyncio.sleep(0.001)
        assert batcher.computing_seconds > first
        encode.gate.set()
        await stuck
        assert batcher.computing_seconds == 0

    asyncio.run(scenario())


def test_an_item_that_comes_as_a_stream_ends_is_not_forgotten() -> None:
    async def scenario() -> None:
        encode = GatedEncoder()
        encode.gate.set()
        batcher = batcher_of(encode)
        for turns in range(8):
            await batcher.rows([1])
            for _ in range(turns):
                await asyncio.sleep(0)
            await batcher.rows([2])

    asyncio.run(asyncio.wait_for(scenario(), timeout=30))
