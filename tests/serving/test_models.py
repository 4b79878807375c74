"""Several models at once: names, loading, swapping, and what a request may name."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.settings import ServingSettings
from tests.serving.wire import data_url, picture, problem
from tests.support import describe, tiny_bundle
from vlm.errors import BundleError
from vlm.inference import Encoder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles, one that was altered, and what is none."""
    folder = tmp_path_factory.mktemp("models")
    tiny_bundle(folder / "first", seed=1)
    tiny_bundle(folder / "second", seed=2)
    tiny_bundle(folder / "altered", seed=3)
    (folder / "altered/tokenizer_config.vlm.json").write_text("{}")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def client(bundle: Path, models: Path, tmp_path: Path) -> Iterator[TestClient]:
    settings = ServingSettings(bundle=bundle, index=tmp_path, models=models, preload=["first"])
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        yield client


def row(client: TestClient, model: str | None, text: str = "red") -> list[float]:
    answer = client.post("/v1/embeddings", json={"input": text, "model": model})
    assert answer.status_code == 200, answer.text
    found: list[float] = answer.json()["data"][0]["embedding"]
    return found


def expected(folder: Path, text: str = "red") -> Any:
    return pytest.approx(Encoder.load(folder).encode_texts([text])[0].tolist(), abs=1e-5)


def test_each_request_is_answered_by_the_model_it_names(
    client: TestClient, bundle: Path, models: Path
) -> None:
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "first"]
    assert listed["available"] == ["altered", "first", "second"]
    assert listed["data"][0]["metrics"] == {"zero_shot": {}}
    assert row(client, None) == row(client, "tiny") == expected(bundle)
    first = expected(models / "first")
    assert row(client, "first") == row(client, listed["data"][1]["fingerprint"]) == first
    assert row(client, "first") != row(client, "tiny")
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["red"]}
    infer = client.post("/v2/models/first/infer", json={"inputs": [tensor]}).json()
    assert (infer["model_name"], infer["outputs"][0]["data"]) == ("first", first)
    assert client.get("/v2/models/first/ready").json()["ready"]
    body = {"images": [data_url(picture())], "labels": ["a", "b"], "model": "first"}
    classified = client.post("/v1/classify", json=body).json()
    assert classified["model"] == listed["data"][1]["fingerprint"]
    body = {"queries": ["a"], "candidates": ["a"], "model": "first"}
    assert client.post("/v1/similarity", json=body).json()["model"] == classified["model"]
    for path, unknown in (("embeddings", {"input": "x"}), ("similarity", body), ("classify", None)):
        asked = unknown or {"images": [data_url(picture())], "labels": ["a"]}
        answer = client.post(f"/v1/{path}", json={**asked, "model": "third"})
        assert "no model is called 'third'; served: 'tiny', 'first'" in problem(answer, 404)


def test_a_model_is_loaded_swapped_and_unloaded_by_name(client: TestClient, models: Path) -> None:
    loaded = client.post("/v1/models/second/load").json()
    assert (loaded["id"], loaded["bundle"]) == ("second", "tiny")
    assert row(client, "second") == expected(models / "second")
    swapped = client.post("/v1/models/second/load", json={"bundle": "first"})
    assert swapped.status_code == 200
    assert row(client, "second") == expected(models / "first")
    text = client.get("/metrics").text
    assert text.count('vlm_model_info{fingerprint="' + loaded["fingerprint"]) == 0
    assert client.post("/v1/models/second/unload").status_code == 204
    problem(client.post("/v1/embeddings", json={"input": "x", "model": "second"}), 404)
    problem(client.post("/v1/models/second/unload"), 404)


def found(client: TestClient) -> list[tuple[str, float]]:
    answer = client.post("/v1/search", json={"text": "red"})
    assert answer.status_code == 200, answer.text
    return [(hit["id"], round(hit["score"], 4)) for hit in answer.json()["results"]]


def listed(client: TestClient) -> dict[str, list[str]]:
    return {m["id"]: m["collections"] for m in client.get("/v1/models").json()["data"]}


def test_a_swapped_default_model_is_kept_in_sight_for_the_collection_of_its_vectors(
    client: TestClient, models: Path, bundle: Path
) -> None:
    old = Encoder.load(bundle).fingerprint
    client.post("/v1/items", json={"items": [{"id": "red", "text": "red"}]})
    assert client.post("/v1/models/tiny/load", json={"bundle": "second"}).status_code == 200
    assert row(client, None) == expected(models / "second")
    assert found(client) == [("red", 1.0)]  # by the model that made the vectors
    assert listed(client) == {"tiny": [], "first": [], old: ["default"]}
    assert row(client, old) == expected(bundle)
    assert f'vlm_model_info{{fingerprint="{old}",name="{old}"' in client.get("/metrics").text
    assert client.get("/readyz").status_code == 200
    assert "default model, which stays" in problem(client.post("/v1/models/tiny/unload"), 409)


def test_a_model_that_lost_its_name_goes_when_no_collection_needs_it(
    client: TestClient, models: Path, bundle: Path
) -> None:
    old = Encoder.load(bundle).fingerprint
    client.post("/v1/items", json={"items": [{"id": "red", "text": "red"}]})
    client.post("/v1/models/tiny/load", json={"bundle": "second"})
    client.put("/v1/collections/later")
    client.post("/v1/items?collection=later", json={"items": [{"id": "new", "text": "red"}]})
    assert found(client) == [("red", 1.0)]
    client.put("/v1/collections/default/alias", json={"collection": "later"})
    assert listed(client) == {"tiny": ["later"], "first": []}
    assert found(client) == [("new", 1.0)]
    assert old not in client.get("/metrics").text
    # The old collection is there again as soon as its model is, under whatever name.
    back = {"collection": "default"}
    assert client.put("/v1/collections/default/alias", json=back).status_code == 200
    assert f"model {old[:12]}, which is not served" in problem(
        client.post("/v1/search", json={"text": "red"}), 409
    )


def test_a_kept_model_can_be_unloaded_and_loaded_again_without_a_restart(
    client: TestClient, models: Path, bundle: Path
) -> None:
    shutil.copytree(bundle, models / "again", dirs_exist_ok=True)
    old = Encoder.load(bundle).fingerprint
    client.post("/v1/items", json={"items": [{"id": "red", "text": "red"}]})
    client.post("/v1/models/tiny/load", json={"bundle": "second"})
    assert client.post(f"/v1/models/{old}/unload").status_code == 204
    problem(client.post("/v1/search", json={"text": "red"}), 409)
    assert client.post("/v1/models/again/load").status_code == 200
    assert found(client) == [("red", 1.0)]
    assert listed(client) == {"tiny": [], "first": [], "again": ["default"]}
    services = client.app.state.services  # type: ignore[attr-defined] # the client types it as ASGI
    client.post("/v1/models/again/load")  # another instance of the same: the first one goes
    assert client.portal is not None
    collection = client.portal.call(services.collections.get)
    assert collection.embedder is services.registry.get("again").embedder
    assert found(client) == [("red", 1.0)]
    shutil.rmtree(models / "again")


def test_what_cannot_be_loaded_changes_nothing(client: TestClient, models: Path) -> None:
    before = row(client, "first")
    said = problem(client.post("/v1/models/first/load", json={"bundle": "altered"}), 422)
    assert "altered since export" in said
    assert str(models) not in said
    for bundle in ("absent", "empty", "../models/first", str(models / "first"), "."):
        problem(client.post("/v1/models/first/load", json={"bundle": bundle}), 404)
    shutil.copytree(models / "second", models / "broken", dirs_exist_ok=True)
    (models / "broken/model.safetensors").unlink()
    said = problem(client.post("/v1/models/first/load", json={"bundle": "broken"}), 422)
    assert "'broken' cannot be served: broken: incomplete, cannot read model.safetensors" in said
    assert "/" not in said
    shutil.rmtree(models / "broken")
    problem(client.post("/v1/models/a%2fb/load", json={"bundle": "first"}), 404)
    said = problem(client.post("/v1/models/a%20b/load", json={"bundle": "first"}), 422)
    assert "a model cannot be called 'a b'" in said
    assert row(client, "first") == before


def test_no_name_may_look_like_a_fingerprint(
    client: TestClient, models: Path, bundle: Path
) -> None:
    default = Encoder.load(bundle).fingerprint
    for name in (default, default.upper(), "0" * 64):
        said = problem(client.post(f"/v1/models/{name}/load", json={"bundle": "second"}), 422)
        assert "64 hexadecimal digits, which are a fingerprint" in said
    assert row(client, default) == expected(bundle)
    shutil.copytree(models / "second", models / default, dirs_exist_ok=True)
    assert default not in client.get("/v1/models").json()["available"]
    shutil.rmtree(models / default)


def test_a_default_model_that_calls_itself_like_a_fingerprint_stops_the_start(
    bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    describe(tmp_path / "b", name="f" * 64)
    settings = ServingSettings(bundle=tmp_path / "b", index=tmp_path / "i")
    with pytest.raises(BundleError, match="like a fingerprint"), TestClient(create_app(settings)):
        pass


def test_requests_that_began_with_a_model_end_with_it(client: TestClient) -> None:
    services = client.app.state.services  # type: ignore[attr-defined] # the client types it as ASGI
    held = services.registry.get("first")
    before = row(client, "first")
    client.post("/v1/models/first/load", json={"bundle": "second"})
    assert row(client, "first") != before
    assert client.portal is not None
    rows = client.portal.call(held.embedder.text_rows, ["red"])
    np.testing.assert_allclose(rows[0], before, atol=1e-6)


@pytest.mark.parametrize(
    ("preload", "said"),
    [
        (["absent"], "no bundle 'absent'"),
        (["tiny"], "no bundle 'tiny'"),
        (["a" * 64], "cannot be called 'aaa.*64 hexadecimal digits"),
    ],
)
def test_a_preload_that_is_not_there_stops_the_start(
    bundle: Path, models: Path, tmp_path: Path, preload: list[str], said: str
) -> None:
    settings = ServingSettings(bundle=bundle, index=tmp_path, models=models, preload=preload)
    with pytest.raises(BundleError, match=said), TestClient(create_app(settings)):
        pass
