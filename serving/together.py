"""Several things at once for one request, none of which goes on for nobody."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["together"]

ResultT = TypeVar("ResultT")


async def together(*parts: Coroutine[Any, Any, ResultT]) -> list[ResultT]:
    """What each returns, in order; when one fails, the others are cancelled.

    `asyncio.gather` lets those go on: what they hold is no longer counted, and no deadline ends
    them.
    """
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
