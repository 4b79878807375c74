"""Which runtime answers, and what is told of it."""

import os
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.settings import ServingSettings
from tests.support import COLOURS, tiny_bundle
from vlm.errors import BundleError
from vlm.inference import Encoder
from vlm.inference.runtimes import Figures, Parity


def client_of(
    bundle: Path, index: Path, runtime: str, runtimes: Path, **changes: object
) -> TestClient:
    settings = ServingSettings.model_validate(
        {"bundle": bundle, "index": index, "runtime": runtime, "runtimes": runtimes, **changes}
    )
    return TestClient(create_app(settings), base_url="http://127.0.0.1")


def test_auto_answers_with_the_fastest_that_passes_and_tells_the_figures(
    bundle: Path, encoder: Encoder, tmp_path: Path
) -> None:
    with client_of(bundle, tmp_path / "i", "auto", tmp_path / "runtimes") as client:
        (model,) = client.get("/v1/models").json()["data"]
        row = client.post("/v1/embeddings", json={"input": "red"}).json()["data"][0]["embedding"]
        assert client.get("/v1/model").json()["runtime"] == model["runtime"]
    figures = {entry["name"]: entry for entry in model["runtimes"]}
    assert set(figures) == {
        "torch-fp32", "torch-bf16", "openvino-fp32", "openvino-bf16", "openvino-mixed",
        "openvino-int8",
    }  # fmt: skip
    assert figures["torch-fp32"]["top1_agreement"] == 1
    assert "no exported runtime" in figures["openvino-int8"]["refused"]
    allowed = [entry for entry in model["runtimes"] if entry["refused"] is None]
    assert allowed[0]["name"] == model["runtime"]
    assert allowed[0]["image_cosine"] >= 0.999
    assert float(np.array(row) @ encoder.encode_texts(["red"])[0]) > 0.999


def test_streams_answer_what_one_answers_and_share_the_cores(
    bundle: Path, encoder: Encoder, tmp_path: Path
) -> None:
    runtimes = tmp_path / "runtimes"
    expected = encoder.encode_texts(COLOURS)
    with client_of(bundle, tmp_path / "i", "openvino-fp32", runtimes, streams=3) as client:
        embedder = client.app.state.services.embedder(None)  # type: ignore[attr-defined] # as ASGI
        assert embedder.streams == 3
        rows = client.post("/v1/embeddings", json={"input": COLOURS}).json()["data"]
        text = client.get("/metrics").text
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-5)
    assert 'vlm_batch_items_count{tower="text"} 3.0' in text


def test_streams_are_as_many_as_cores_up_to_two_and_fewer_for_several_processes() -> None:
    cores = len(os.sched_getaffinity(0))
    assert ServingSettings().streams_here == min(2, cores)
    assert ServingSettings(workers=64).streams_here == max(1, min(2, cores // 64))
    assert ServingSettings(workers=2, streams=7).streams_here == 7


def test_the_reference_needs_no_measurement_and_writes_nothing(
    bundle: Path, tmp_path: Path
) -> None:
    with client_of(bundle, tmp_path / "i", "torch-fp32", tmp_path / "runtimes") as client:
        (model,) = client.get("/v1/models").json()["data"]
    assert (model["runtime"], model["runtimes"]) == ("torch-fp32", [])
    assert not (tmp_path / "runtimes").exists()


def test_a_runtime_that_strays_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bundle(tmp_path / "bundle")
    strayed = Parity(
        image_cosine=0.97, text_cosine=1, top1_agreement=0.9, num_pairs=200, calibration="pairs"
    )
    figures = Figures(runtime="torch-bf16", parity=strayed, refused=strayed.shortfall)
    monkeypatch.setattr(
        "vlm.inference.runtimes.select.read_figures", lambda path, conditions: figures
    )
    client = client_of(tmp_path / "bundle", tmp_path / "i", "torch-bf16", tmp_path / "runtimes")
    with pytest.raises(BundleError, match=r"images 0\.97000, at least 0\.999 is needed"), client:
        pass
