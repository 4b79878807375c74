"""Spans for OpenTelemetry, where it is configured; nothing is imported or done where it is not."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from vlm.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["Tracing", "otlp_provider", "stage"]

_TRACER: Final[ContextVar[Any]] = ContextVar("tracer", default=None)


class Tracing:
    """A span for each request, with those of its stages inside.

    Args:
        provider: Where spans go.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("vlm.serving")

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str], request_id: str) -> Iterator[Any]:
        """The span of one request, under the client's own where it sends `traceparent`."""
        from opentelemetry.propagate import extract  # noqa: PLC0415 - the extra may be missing
        from opentelemetry.trace import SpanKind  # noqa: PLC0415 - with it

        token = _TRACER.set(self._tracer)
        try:
            attributes = {"http.request.method": method, "vlm.request_id": request_id}
            with self._tracer.start_as_current_span(
                method, context=extract(headers), kind=SpanKind.SERVER, attributes=attributes
            ) as span:
                yield span
        finally:
            _TRACER.reset(token)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def stage(name: str, **attributes: int | str) -> AbstractContextManager[Any]:
    """A span inside that of the request, e.g. `text` with the number of items."""
    tracer = _TRACER.get()
    if tracer is None:
        return nullcontext()
    found: AbstractContextManager[Any] = tracer.start_as_current_span(name, attributes=attributes)
    return found


def otlp_provider(endpoint: str) -> "TracerProvider":
    """Spans to a collector, e.g. at http://localhost:4318/v1/traces.

    Raises:
        ConfigError: If the libraries are missing.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - extra
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - with it
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - with it
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - with it
    except ImportError as error:
        message = "traces: OpenTelemetry is not installed: pip install 'vlm[telemetry]'"
        raise ConfigError(message) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "vlm"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider
