import json
import struct
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.wire import JSON, problem

INFER = "/v2/models/tiny/infer"


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["red"], **changes}


def refusal(client: TestClient, tree: Any, *, after: bytes = b"", size: str | None = None) -> str:
    body = json.dumps(tree).encode()
    headers = {"inference-header-content-length": str(len(body)) if size is None else size}
    answer = client.post(INFER, content=body + after, headers=headers if after or size else JSON)
    detail = problem(answer, 400)
    assert answer.json()["error"] == detail
    return detail


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({}, "body.inputs"),
        ({"inputs": []}, "body.inputs"),
        ({"inputs": [tensor(shape=[])]}, "body.inputs.0.shape"),
        ({"inputs": [tensor(shape=[-1])]}, "body.inputs.0.shape.0"),
        ({"inputs": [tensor(shape=[2])]}, "text: shape [2] and 1 elements"),
        ({"inputs": [tensor(data=None)]}, "text: shape [1] and 0 elements"),
        (
            {"inputs": [tensor(datatype="FP32")]},
            "text: datatype 'FP32', expected BYTES: image files as they are",
        ),
        ({"inputs": [tensor(datatype="FP32", data=[[0.5]])]}, "numbers are not understood"),
        ({"inputs": [tensor(name="sound")]}, "input 'sound'"),
        ({"inputs": [tensor(), tensor()]}, "at most once"),
        ({"inputs": [tensor(name="image", data=["%"])]}, "images in JSON are base64"),
        ({"inputs": [tensor(data=["x" * 2001])]}, "2001 characters"),
        ({"inputs": [tensor()], "outputs": [{"name": "x"}]}, "lead to text_embedding"),
        (
            {"inputs": [tensor(data=None, parameters={"binary_data_size": 5})]},
            "binary_data_size 5, and 0 bytes are left",
        ),
    ],
)
def test_what_does_not_fit_the_protocol_is_refused_by_name(
    client: TestClient, tree: Any, named: str
) -> None:
    assert named in refusal(client, tree)


def test_raw_tensors_that_do_not_fit_are_refused(client: TestClient) -> None:
    def raw(size: Any) -> dict[str, Any]:
        return {"inputs": [tensor(data=None, parameters={"binary_data_size": size})]}

    packed = struct.pack("<I", 3) + b"red"
    assert "1 bytes follow the last tensor" in refusal(client, raw(7), after=packed + b"!")
    assert "element 0 is longer" in refusal(client, raw(7), after=struct.pack("<I", 9) + b"red")
    assert "element 1 is longer" in refusal(client, raw(8), after=packed + b"!")
    assert "binary_data_size 99" in refusal(client, raw(99), after=packed)
    assert "binary_data_size '7'" in refusal(client, raw("7"), after=packed)
    assert "not UTF-8" in refusal(client, raw(5), after=struct.pack("<I", 1) + b"\xff")
    for size in ("-1", "x", "99999", "9" * 40, "²"):
        body = json.dumps(raw(7)).encode()
        headers = {b"inference-header-content-length": size.encode()}
        assert "inference-header" in problem(client.post(INFER, content=body, headers=headers), 400)


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=40), cut=st.integers(0, 80))
def test_no_bytes_are_a_defect_of_the_server(client: TestClient, data: bytes, cut: int) -> None:
    tree = {"inputs": [tensor(data=None, parameters={"binary_data_size": len(data)})]}
    body = json.dumps(tree).encode() + data
    headers = {"inference-header-content-length": str(min(cut + 40, len(body)))}
    assert client.post(INFER, content=body, headers=headers).status_code in (200, 400)
    headers = {"inference-header-content-length": str(len(body) - len(data))}
    assert client.post(INFER, content=body, headers=headers).status_code in (200, 400)


def test_nested_data_of_a_column_are_read_in_order(client: TestClient) -> None:
    flat = client.post(INFER, json={"inputs": [tensor(shape=[2], data=["red", "blue"])]}).json()
    column = {"inputs": [tensor(shape=[2, 1], data=[["red"], ["blue"]])]}
    nested = client.post(INFER, json=column).json()
    assert nested["outputs"] == flat["outputs"]
    assert flat["outputs"][0]["shape"] == [2, 16]
    assert len(flat["outputs"][0]["data"]) == 32
    assert flat["model_name"] == "tiny"


def test_a_broken_model_is_live_but_not_ready(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*, seconds: float | None) -> None:
        raise RuntimeError

    paths = ("/v2/health/ready", "/v2/models/tiny/ready")
    assert [client.get(path).json()["ready"] for path in paths] == [True, True]
    services = client.app.state.services  # type: ignore[attr-defined] # the client types it as ASGI
    monkeypatch.setattr(services.embedder(), "check", broken)
    assert [client.get(path).status_code for path in paths] == [503, 503]
    assert client.get("/v2/health/live").status_code == 200
