"""What is written to standard error: lines for a person, or JSON for a machine. Never a payload."""

import json
import logging
import sys
from typing import Any, Final, Literal

from serving.context import REQUEST_ID

__all__ = ["JsonFormatter", "TextFormatter", "configure_logging"]

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {
    "message", "asctime", "taskName", "color_message", "fields",
}  # fmt: skip


class TextFormatter(logging.Formatter):
    """A line for a person: level, logger, event, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        if request_id := REQUEST_ID.get():
            fields.setdefault("request_id", request_id)
        record.fields = "".join(f" {name}={value}" for name, value in fields.items())
        return super().format(record)


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
        if request_id := REQUEST_ID.get():
            entry.setdefault("request_id", request_id)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Send every logger's events, uvicorn's too, to standard error in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if log_format == "json"
        else TextFormatter("%(levelname)s %(name)s: %(message)s%(fields)s")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log whole addresses
