import asyncio

import pytest

from serving.together import together


def test_answers_are_in_order() -> None:
    async def after(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(together(*(after(turns) for turns in (3, 1, 2)))) == [3, 1, 2]


def test_when_one_fails_the_others_do_not_go_on_for_nobody() -> None:
    """A search by 31 pictures and a missing id was a 404, and 31 pictures decoded after it."""
    told: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    async def broken() -> None:
        await asyncio.sleep(0)
        raise ValueError

    async def scenario() -> None:
        with pytest.raises(ValueError, match="^$"):
            await together(endless(), broken(), endless())
        await asyncio.sleep(0)
        assert told == 2 * ["cancelled"]

    asyncio.run(scenario())
