"""What tests of the API say and hear."""

import base64
from collections.abc import Mapping
from typing import Any, Protocol

from tests.support import drawing, encoded

__all__ = ["JSON", "Answer", "data_url", "picture", "problem"]

JSON = {"content-type": "application/json"}


class Answer(Protocol):
    """What a response is to a test, whichever client got it."""

    @property
    def status_code(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    def json(self) -> Any: ...


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def picture(colour: str = "red", shape: str = "circle") -> bytes:
    return encoded(drawing(colour, shape))


def problem(answer: Answer, status: int) -> str:
    """The detail of a problem, checked to be one."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["request_id"] == answer.headers["x-request-id"]
    return str(body["detail"])
