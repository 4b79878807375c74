import base64
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from serving.app import create_app
from serving.routes import classes
from serving.settings import ServingSettings
from tests.serving.wire import data_url, picture, problem
from tests.support import encoded
from vlm.preprocess import decode_image

SETS = "/v1/label-sets"


def test_examples_are_decoded_where_images_are_and_no_longer_than_the_request(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    given_up = threading.Event()

    def slow(data: bytes, *, max_pixels: int) -> np.ndarray:
        threads.append(threading.current_thread().name)
        assert given_up.wait(60)
        return decode_image(data, max_pixels=max_pixels)

    monkeypatch.setattr(classes, "decode_image", slow)
    settings = ServingSettings(bundle=bundle, index=tmp_path / "i", decode_threads=2)
    body = {"classes": [{"label": "a", "images": [data_url(picture())] * 12}]}
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        answer = client.put(f"{SETS}/x", json=body, headers={"x-request-timeout": "1"})
        given_up.set()
        problem(answer, 504)
        assert client.put(f"{SETS}/y", json={"classes": ["a"]}).status_code == 200
        broken = [{"label": "a", "images": ["AAAA", *[data_url(picture())] * 11]}]
        problem(client.put(f"{SETS}/x", json={"classes": broken}), 422)
        assert client.get(SETS).json() == {"label_sets": ["y"]}
    assert {name.partition("_")[0] for name in threads} == {"decode"}
    assert 2 < len(threads) < 12


@pytest.mark.parametrize("size", [(3000, 40), (40, 3000), (2400, 600), (20_000, 30)])
def test_an_elongated_example_is_kept_as_the_model_sees_it(
    bundle: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    settings = ServingSettings(bundle=bundle, index=tmp_path / "i")
    shown = [{"label": "a", "images": [data_url(encoded(image))], "image_weight": 1}]
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        assert client.put(f"{SETS}/x", json={"classes": shown}).status_code == 200
        asked = {"images": [data_url(encoded(image))], "label_set": "x"}
        (result,) = client.post("/v1/classify", json=asked).json()["results"]
    assert result["predictions"][0]["score"] > 0.999
    file = json.loads((tmp_path / "i-label-sets/x.json").read_text())
    kept = Image.open(io.BytesIO(base64.b64decode(file["classes"][0]["images"][0])))
    assert min(kept.size) == min(512, *size)


def test_an_example_is_kept_at_512_pixels_and_4_million_in_all() -> None:
    for given, kept in (
        ((512, 512), (512, 512)),
        ((1024, 2048), (512, 1024)),
        ((6000, 4000), (768, 512)),
        ((16_000, 500), (11_299, 354)),
        ((1, 50_000_000), (1, 4_000_000)),
    ):
        assert classes._example_size(*given) == kept
