"""Schemathesis asks every operation of the OpenAPI document, well and badly formed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving.app import create_app
from serving.settings import ServingSettings
from tests.support import tiny_bundle

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def client(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("openapi")
    tiny_bundle(folder / "models/other", seed=1)
    config = ServingSettings(bundle=bundle, index=folder / "i", models=folder / "models")
    with TestClient(create_app(config), base_url="http://127.0.0.1") as client:
        yield client


def sent(case: Case[Any]) -> dict[str, Any]:
    """The request, made by the library that Schemathesis speaks, for the client of this process."""
    known = {"method", "url", "headers", "params", "json", "data", "files", "cookies"}
    transport = case.as_transport_kwargs(base_url="http://127.0.0.1")
    made = requests.Request(**{k: v for k, v in transport.items() if k in known}).prepare()
    headers = {name: value for name, value in made.headers.items() if name != "Content-Length"}
    return {"method": made.method, "url": made.url, "headers": headers, "content": made.body}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_breaks_the_server_or_gets_what_is_not_described(
    client: TestClient, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    asked = 0
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()

        @settings(
            max_examples=6,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case[Any]) -> None:
            nonlocal asked
            answer = client.request(**sent(case), follow_redirects=False)
            case.validate_response(answer, checks=CHECKS)
            asked += 1

        if mode is GenerationMode.POSITIVE or operation.body or operation.query:
            ask()
    assert asked > 20
