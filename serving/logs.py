"""What is written to standard error: lines for a person, or JSON for a machine. Never a payload."""

import json
import logging
import sys
from typing import Any, Final, Literal

from serving.context import REQUEST_ID

__all__ = ["JsonFormatter", "TextFormatter", "configure_logging"]

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {
    "message", "asctime", "taskName", "color_message",
}  # fmt: skip


class TextFormatter(logging.Formatter):
    """A line for a person: level, logger, event, and the event's fields."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        told = "".join(f" {name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + told


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, event, the event's fields, and the request's id."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What an event was told with, and the request's id."""
    found = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    if request_id := REQUEST_ID.get():
        found.setdefault("request_id", request_id)
    return found


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Send every logger's events, uvicorn's too, to standard error in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if log_format == "json"
        else TextFormatter("%(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log whole addresses
