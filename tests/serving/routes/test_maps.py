from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.settings import ServingSettings
from tests.serving.wire import data_url, picture, problem
from tests.support import COLOURS, drawing, give_means, tiny_bundle
from vlm.inference import Encoder

CAPTIONS = [f"a {colour} circle" for colour in COLOURS]
PICTURES = [drawing(colour, "circle") for colour in COLOURS]
MAP = "/v1/collections/default/map"


def test_a_map_shows_pictures_and_captions_as_stored_and_centred(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    give_means(tmp_path / "bundle", PICTURES, CAPTIONS)
    settings = ServingSettings(bundle=tmp_path / "bundle", index=tmp_path / "index")
    items = [
        {"id": f"p-{colour}", "image": data_url(picture(colour)), "text": caption}
        for colour, caption in zip(COLOURS, CAPTIONS, strict=True)
    ]
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        client.post("/v1/items", json={"items": items})
        found = client.get(MAP).json()
        assert client.get(MAP).json() == found
        few = client.get(MAP, params={"sample": 3}).json()
    assert [p["modality"] for p in found["points"]] == ["image"] * 8 + ["text"] * 8
    assert [p["id"] for p in found["points"][:8]] == [p["id"] for p in found["points"][8:]]
    assert len(few["points"]) == 6
    assert few["items"] == 8
    encoder = Encoder.load(tmp_path / "bundle")
    images, texts = encoder.encode_images(PICTURES), encoder.encode_texts(CAPTIONS)
    gap = np.linalg.norm(images.mean(axis=0) - texts.mean(axis=0))
    assert found["raw"]["gap"] == pytest.approx(gap, abs=1e-3)
    assert found["centred"]["gap"] < found["raw"]["gap"] / 2
    for view in ("raw", "centred"):
        places = np.array([p[view] for p in found["points"]])
        assert np.abs(places.mean(axis=0)).max() < 1e-3
        assert 0 < found[view]["explained_fraction"] <= 1


def test_a_map_without_means_is_drawn_as_stored_alone(client: TestClient) -> None:
    empty = client.get(MAP).json()
    assert (empty["points"], empty["items"], empty["raw"]["gap"]) == ([], 0, None)
    client.post("/v1/items", json={"items": [{"id": "note", "text": "buy apples"}]})
    client.post("/v1/items", json={"items": [{"id": "bare", "image": data_url(picture())}]})
    found = client.get(MAP).json()
    assert {(p["id"], p["modality"]) for p in found["points"]} == {
        ("note", "text"),
        ("bare", "image"),
    }
    assert found["centred"] is None
    assert [p["centred"] for p in found["points"]] == [None, None]
    by_id = {p["id"]: p for p in found["points"]}
    assert by_id["bare"]["thumbnail"] == "/v1/items/bare/thumbnail"
    assert by_id["note"]["thumbnail"] is None
    problem(client.get("/v1/collections/nobody/map"), 404)
    problem(client.get(MAP, params={"sample": 100_000}), 422)
