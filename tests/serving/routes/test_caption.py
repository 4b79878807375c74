from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.settings import ServingSettings
from tests.serving.wire import data_url, picture, problem
from tests.support import TINY_COCA, tiny_bundle
from vlm.inference import Captioner, GreedySearch, save_bundle
from vlm.models import CoCa, CocaConfig
from vlm.preprocess import ImageConfig, TokenizerConfig, decode_image


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("coca") / "bundle"
    config = CocaConfig.model_validate(TINY_COCA)
    save_bundle(
        folder,
        CoCa(config, image_size=32, context_length=8),
        name="writer",
        image=ImageConfig(size=32),
        tokenizer=TokenizerConfig(context_length=8),
    )
    return folder


def test_captions_are_those_of_the_captioner_and_other_questions_are_answered_too(
    writer: Path, tmp_path: Path
) -> None:
    tiny_bundle(tmp_path / "models/silent")
    settings = ServingSettings(
        bundle=writer, index=tmp_path / "i", models=tmp_path / "models", preload=["silent"]
    )
    images = [picture("red"), picture("blue", "square")]
    decoded = [decode_image(image) for image in images]
    expected = Captioner.load(writer).caption(decoded, GreedySearch())
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        client.post("/v1/embeddings", json={"input": data_url(images[0])})  # its row is known now
        body = {"images": [data_url(image) for image in images], "search": "greedy"}
        answer = client.post("/v1/caption", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["captions"] == expected
        files = [("images", ("a.png", image)) for image in images]
        upload = client.post("/v1/caption", files=files, data={"search": "greedy"})
        assert upload.json() == answer.json()
        drawn = [
            client.post("/v1/caption", json={**body, "search": "nucleus", "seed": 7}).json()
            for _ in range(2)
        ]
        assert drawn[0] == drawn[1]
        assert client.get("/v1/models").json()["data"][0]["kind"] == "coca"
        ask = {"images": [data_url(picture("green"))], "labels": ["a", "b"]}
        assert client.post("/v1/classify", json=ask).status_code == 200
        silent = client.post("/v1/caption", json={**body, "model": "silent"})
        assert "model 'silent' writes no captions" in problem(silent, 422)
        changes: list[dict[str, Any]] = [
            {"images": []}, {"search": "loud"}, {"seed": -1}, {"images": ["bm8="]},
        ]  # fmt: skip
        for change in changes:
            problem(client.post("/v1/caption", json={**body, **change}), 422)
