import builtins
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serving.app import create_app
from serving.settings import ServingSettings
from serving.tracing import Tracing, otlp_provider, stage
from tests.serving.wire import data_url, picture
from vlm.errors import ConfigError


def test_a_request_is_a_span_with_its_stages_inside(bundle: Path, tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(ServingSettings(bundle=bundle, index=tmp_path), tracing=Tracing(provider))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        body = {"input": ["a secret text", data_url(picture())]}
        answer = client.post("/v1/embeddings", json=body, headers={"traceparent": parent})
        client.get("/v1/nothing/here")
        spans = {span.name: span for span in exporter.get_finished_spans()}
    request = spans["POST /v1/embeddings"]
    assert set(spans) == {"POST /v1/embeddings", "decode", "image", "text", "GET other"}
    own = request.get_span_context()
    assert own is not None
    for name in ("decode", "image", "text"):
        parent_span = spans[name].parent
        assert parent_span is not None
        assert parent_span.span_id == own.span_id
    assert request.parent is not None
    assert f"{request.parent.span_id:x}" == "b7ad6b7169203331"
    attributes = dict(request.attributes or {})
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/embeddings",
        "http.response.status_code": 200,
        "vlm.request_id": answer.headers["x-request-id"],
    }
    assert not [s for s in spans.values() if "secret" in s.to_json()]


def test_without_a_tracer_a_stage_is_nothing() -> None:
    with stage("decode", files=1) as span:
        assert span is None


def test_missing_libraries_are_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return plain(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'vlm\[telemetry\]'"):
        otlp_provider("http://127.0.0.1:4318/v1/traces")
