"""Requests that end before they are answered."""

import asyncio

from starlette.types import Message, Receive, Scope, Send

from serving.metrics import Metrics
from serving.security import GuardMiddleware
from serving.settings import ServingSettings


def test_a_client_that_hangs_up_ends_what_was_done_for_it() -> None:
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert not (await receive())["more_body"]
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def scenario() -> None:
        hung_up = asyncio.Event()
        messages: list[Message] = [{"type": "http.request", "body": b"x", "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await hung_up.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        sent: list[Message] = []
        metrics = Metrics()
        guard = GuardMiddleware(app, ServingSettings(), metrics)
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/x",
            "headers": [(b"host", b"localhost")],
        }
        task = asyncio.create_task(guard(scope, receive, send))
        await asyncio.sleep(0.01)
        assert not ended.is_set()
        hung_up.set()
        await asyncio.wait_for(task, 30)
        assert ended.is_set()
        assert sent[0]["status"] == 499
        assert guard._limits.held_bytes == 0

    asyncio.run(scenario())


def test_what_is_not_done_as_the_server_ends_is_answered_503() -> None:
    """It was a defect with a traceback in the log."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    async def scenario() -> None:
        async def send(message: Message) -> None:
            sent.append(message)

        sent: list[Message] = []
        guard = GuardMiddleware(app, ServingSettings())
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/x",
            "headers": [(b"host", b"localhost")],
        }
        task = asyncio.create_task(guard(scope, asyncio.Event().wait, send))  # type: ignore[arg-type] # nobody sends
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait_for(task, 30)
        assert sent[0]["status"] == 503
        assert b"the server ended" in sent[1]["body"]

    asyncio.run(scenario())
