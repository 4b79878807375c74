"""A pool of threads whose clients take turns, as those of the model's queue do."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar

from serving.context import CLIENT
from serving.together import together

__all__ = ["Turns"]

Arguments = ParamSpec("Arguments")
ResultT = TypeVar("ResultT")


class Turns:
    """Gives an executor no more jobs than it has threads; who waits for more waits here.

    An executor of its own does what came first: one request with many large pictures would hold
    everybody up until the last of them is decoded.

    Args:
        executor: Runs the jobs; only with `at_once` of them at a time.
        at_once: Its threads.
    """

    def __init__(self, executor: Executor, at_once: int) -> None:
        self._executor = executor
        self._free = at_once
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def run(
        self,
        function: Callable[Arguments, ResultT],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> ResultT:
        """What the function returns, once it is this client's turn.

        A caller that is cancelled before gives its turn to the next; a job that has begun is
        finished, and holds its thread until then.
        """
        loop = asyncio.get_running_loop()
        if self._free:
            self._free -= 1
        else:
            await self._turn(loop)
        job = self._executor.submit(function, *args, **kwargs)
        job.add_done_callback(lambda _: _later(loop, self._pass_on))
        return await asyncio.wrap_future(job)

    async def run_each(
        self, function: Callable[..., ResultT], arguments: Sequence[tuple[Any, ...]]
    ) -> list[ResultT]:
        """What the function returns for each of several arguments, a job each, in order.

        If one of them fails, those that were not begun never are.
        """
        if len(arguments) == 1:
            return [await self.run(function, *arguments[0])]
        return await together(*(self.run(function, *each) for each in arguments))

    async def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        turn: asyncio.Future[None] = loop.create_future()
        self._queues.setdefault(CLIENT.get(), deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given at the very moment of the cancellation
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """A thread has become free: the client that has waited longest for a turn gets it."""
        while self._queues:
            client, queue = next(iter(self._queues.items()))
            turn = queue.popleft()
            if queue:
                self._queues.move_to_end(client)
            else:
                del self._queues[client]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


def _later(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if not loop.is_closed():  # the server has ended, and nobody waits
        loop.call_soon_threadsafe(call)
