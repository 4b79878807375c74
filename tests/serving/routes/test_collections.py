import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.services.catalogs import open_catalog
from serving.settings import ServingSettings
from tests.serving.wire import problem
from tests.support import tiny_bundle


@pytest.fixture(scope="module")
def settings(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> ServingSettings:
    root = tmp_path_factory.mktemp("collections")
    tiny_bundle(root / "models" / "other", seed=3)
    return ServingSettings(
        bundle=bundle,
        index=root / "index",
        models=root / "models",
        preload=["other"],
        exact_below=100,
        max_images=200,
    )


@pytest.fixture(scope="module")
def client(settings: ServingSettings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        yield client


def add(client: TestClient, collection: str | None, *names: str) -> None:
    params = {} if collection is None else {"collection": collection}
    body = {"items": [{"id": name, "text": name, "metadata": {"n": name}} for name in names]}
    answer = client.post("/v1/items", json=body, params=params)
    assert answer.status_code == 201, answer.text


def found(client: TestClient, **body: Any) -> list[str]:
    answer = client.post("/v1/search", json={"text": "red", **body})
    assert answer.status_code == 200, answer.text
    return sorted(hit["id"] for hit in answer.json()["results"])


def test_collections_hold_their_own_items_of_their_own_model(client: TestClient) -> None:
    assert client.get("/v1/collections").json() == {"collections": ["default"], "aliases": {}}
    made = client.put("/v1/collections/birds", json={"model": "other"}).json()
    assert (made["name"], made["items"], made["indexed"]) == ("birds", 0, False)
    assert client.put("/v1/collections/birds", json={"model": "other"}).json() == made
    add(client, None, "rock")
    add(client, "birds", "robin", "wren")
    assert found(client) == ["rock"]
    assert found(client, collection="birds") == ["robin", "wren"]
    described = client.get("/v1/collections/birds").json()
    assert (described["items"], described["texts"], described["images"]) == (2, 2, 0)
    other = client.get("/v1/collections/default").json()["fingerprint"]
    assert described["fingerprint"] != other
    assert client.get("/v1/items/wren", params={"collection": "birds"}).status_code == 200
    problem(client.get("/v1/items/wren"), 404)
    assert "of model" in problem(client.put("/v1/collections/birds"), 409)
    client.post("/v1/items/delete", params={"collection": "birds"}, json={"ids": ["wren"]})
    assert found(client, collection="birds") == ["robin"]


def test_an_alias_is_switched_between_one_request_and_the_next(client: TestClient) -> None:
    for name in ("day", "night"):
        client.put(f"/v1/collections/{name}")
        add(client, name, f"in {name}")
        answer = client.put("/v1/collections/now/alias", json={"collection": name})
        assert answer.json()["aliases"] == {"now": name}
        assert found(client, collection="now") == [f"in {name}"]
    assert "points to 'night'" in problem(client.delete("/v1/collections/night"), 409)
    assert "points to 'night'" in problem(client.delete("/v1/collections/now"), 409)
    taken = client.put("/v1/collections/day/alias", json={"collection": "night"})
    assert "is a collection" in problem(taken, 409)
    assert "is an alias" in problem(client.put("/v1/collections/now"), 409)
    assert client.delete("/v1/collections/now/alias").json()["aliases"] == {}
    assert "there are: none" in problem(client.delete("/v1/collections/now/alias"), 404)
    client.put("/v1/collections/now/alias", json={"collection": "day"})
    client.put("/v1/collections/now/alias", json={"collection": "now"})
    assert client.get("/v1/collections").json()["aliases"] == {}
    client.put("/v1/collections/default/alias", json={"collection": "day"})
    assert found(client) == ["in day"]
    client.put("/v1/collections/default/alias", json={"collection": "default"})
    assert found(client) == ["rock"]
    assert client.delete("/v1/collections/day").status_code == 204
    assert "no collection is called 'day'" in problem(client.get("/v1/collections/day"), 404)


def test_what_is_no_collection_is_refused_in_words(client: TestClient) -> None:
    for name in ("..", "%2e%2e%2f", "a.b", "x" * 65, "nobody"):
        assert client.get(f"/v1/collections/{name}").status_code in (404, 405)
    assert "letters, digits" in problem(client.put("/v1/collections/a.b"), 422)
    body = {"text": "x", "collection": "../index"}
    assert "no collection is called" in problem(client.post("/v1/search", json=body), 404)
    assert "stays" in problem(client.delete("/v1/collections/default"), 409)
    client.put("/v1/collections/empty")
    assert "is empty" in problem(client.post("/v1/collections/empty/measure"), 422)


def test_a_collection_of_a_model_that_is_not_served_says_which_it_needs(
    client: TestClient, settings: ServingSettings
) -> None:
    folder = settings.collections_folder / "foreign"
    folder.mkdir(parents=True)
    told = {"format": 2, "fingerprint": "ab" * 32, "dim": 16}
    (folder / "collection.json").write_text(json.dumps(told))
    body = {"text": "x", "collection": "foreign"}
    detail = problem(client.post("/v1/search", json=body), 409)
    assert "model abababababab, which is not served" in detail
    aliased = client.put("/v1/collections/later/alias", json={"collection": "foreign"})
    assert "not served" in problem(aliased, 409)


def test_after_a_migration_nothing_is_written_until_its_model_is_served(
    client: TestClient, settings: ServingSettings
) -> None:
    """It went into the old collection, and vanished when the model was loaded."""
    note = {"items": [{"id": "before", "text": "milk"}]}
    assert client.post("/v1/items", json=note).status_code == 201
    folder = settings.collections_folder / "migrated"
    folder.mkdir(parents=True)
    told = {"format": 2, "fingerprint": "ab" * 32, "dim": 16}
    (folder / "collection.json").write_text(json.dumps(told))
    catalog = open_catalog(settings)
    catalog.point("default", "migrated")  # as `vlm index migrate` does, in a process of its own
    assert client.get("/v1/items/before").status_code == 200
    assert client.post("/v1/search", json={"text": "milk"}).status_code == 200
    for refused in (
        client.post("/v1/items", json=note),
        client.post("/v1/items/delete", json={"ids": ["before"]}),
        client.delete("/v1/items/before"),
    ):
        assert "model abababababab, which is not served" in problem(refused, 409)
    catalog.point("default", "default")
    assert client.delete("/v1/items/before").status_code == 204


def test_a_grown_collection_is_indexed_and_measured_by_itself(client: TestClient) -> None:
    client.put("/v1/collections/grown")
    add(client, "grown", *(f"thing {n}" for n in range(120)))
    start = time.monotonic()
    while (described := client.get("/v1/collections/grown").json())["measurement"] is None:
        assert time.monotonic() - start < 60
        time.sleep(0.05)
    measured = described["measurement"]
    assert described["indexed"]
    assert (measured["items"], measured["target"]) == (120, 0.95)
    assert measured["meets_target"]
    assert measured["curve"][0]["recall"] == {"image": 1}
    assert measured["chosen"] in measured["curve"]
    text = client.get("/metrics").text
    assert 'vlm_collection_recall{collection="grown",query="image"}' in text
    assert len(found(client, collection="grown", filter={"n": "thing 7"})) == 1
    again = client.post("/v1/collections/grown/measure").json()
    assert again["measurement"]["measured_at"] > measured["measured_at"]


def test_what_another_process_measures_or_removes_is_seen_by_the_next_request(
    client: TestClient, settings: ServingSettings
) -> None:
    client.put("/v1/collections/shared")
    add(client, "shared", *(f"thing {n}" for n in range(3)))
    measured = client.post("/v1/collections/shared/measure").json()["measurement"]
    folder = settings.collections_folder / "shared"
    tree = json.loads((folder / "recall.json").read_text())
    (folder / "recall.json").write_text(json.dumps({**tree, "items": 77}))
    again = client.get("/v1/collections/shared").json()["measurement"]
    assert (measured["items"], again["items"]) == (3, 77)
    shutil.rmtree(folder)
    problem(client.get("/v1/collections/shared"), 404)


def test_a_damaged_collection_is_listed_harms_no_other_and_can_be_removed(
    bundle: Path, tmp_path: Path
) -> None:
    settings = ServingSettings(bundle=bundle, index=tmp_path / "i")
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        for name in ("sound", "broken"):
            client.put(f"/v1/collections/{name}")
        (settings.collections_folder / "broken" / "collection.json").write_text("{")
        names = client.get("/v1/collections").json()["collections"]
        assert names == ["default", "broken", "sound"]
        assert "damaged" in problem(client.get("/v1/collections/broken"), 503)
        problem(client.post("/v1/search", json={"text": "a", "collection": "none"}), 404)
        assert client.delete("/v1/collections/sound").status_code == 204
        assert client.delete("/v1/collections/broken").status_code == 204
        assert client.get("/v1/collections").json()["collections"] == ["default"]
