"""Which runtime answers, and what is told of it."""

from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.settings import ServingSettings
from tests.support import tiny_bundle
from vlm.errors import BundleError
from vlm.inference import Encoder
from vlm.inference.runtimes import Figures, Parity


def client_of(bundle: Path, index: Path, runtime: str, runtimes: Path) -> TestClient:
    settings = ServingSettings.model_validate(
        {"bundle": bundle, "index": index, "runtime": runtime, "runtimes": runtimes}
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
