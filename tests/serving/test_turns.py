import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.context import CLIENT
from serving.turns import Turns


class Gate:
    """Jobs that note their names and wait."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.open = threading.Event()

    def __call__(self, name: str) -> str:
        self.begun.append(name)
        assert self.open.wait(30)
        if name == "broken":
            raise ValueError(name)
        return name.upper()


async def of(client: str, call: Coroutine[None, None, str]) -> str:
    CLIENT.set(client)
    return await call


def test_clients_take_turns_however_many_jobs_one_has() -> None:
    """A request with many large pictures held everybody up until the last of them was decoded."""

    async def scenario() -> None:
        gate = Gate()
        turns = Turns(ThreadPoolExecutor(1), 1)
        many = [asyncio.create_task(of("a", turns.run(gate, f"a{n}"))) for n in range(5)]
        await asyncio.sleep(0)
        few = [asyncio.create_task(of("b", turns.run(gate, f"b{n}"))) for n in range(2)]
        await asyncio.sleep(0)
        gate.open.set()
        assert await asyncio.gather(*many, *few) == ["A0", "A1", "A2", "A3", "A4", "B0", "B1"]
        assert gate.begun == ["a0", "a1", "b0", "a2", "b1", "a3", "a4"]

    asyncio.run(scenario())


def test_who_leaves_gives_the_turn_on_and_a_failure_is_its_own() -> None:
    async def scenario() -> None:
        gate = Gate()
        turns = Turns(ThreadPoolExecutor(2), 2)
        running = [asyncio.create_task(turns.run(gate, name)) for name in ("broken", "left")]
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(turns.run(gate, name)) for name in ("gone", "kept")]
        await asyncio.sleep(0)
        for task in (running[1], waiting[0]):
            task.cancel()
        await asyncio.sleep(0.01)
        assert sorted(gate.begun) == ["broken", "left"]  # one who left still has its thread
        gate.open.set()
        with pytest.raises(ValueError, match="broken"):
            await running[0]
        assert await waiting[1] == "KEPT"
        assert "gone" not in gate.begun
        with pytest.raises(ValueError, match="broken"):
            await turns.run_each(gate, [(name,) for name in ("1", "broken", "2", "3", "4", "5")])
        await asyncio.sleep(0.01)
        assert "5" not in gate.begun
        again = await asyncio.gather(*(turns.run(gate, name) for name in ("x", "y", "z")))
        assert again == ["X", "Y", "Z"]

    asyncio.run(asyncio.wait_for(scenario(), 30))
