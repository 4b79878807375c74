import base64
import json
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.serving.wire import data_url, picture, problem
from tests.support import drawing
from vlm.inference import Encoder


def test_embeddings_are_the_encoders_in_the_order_given(
    client: TestClient, encoder: Encoder
) -> None:
    inputs = ["a red circle", data_url(picture("blue")), "", "a red circle"]
    assert "input" in problem(client.post("/v1/embeddings", json={"input": inputs}), 422)
    inputs.remove("")
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": inputs}).json()
    rows = np.array([entry["embedding"] for entry in answer["data"]], np.float32)
    text = encoder.encode_texts(["a red circle"])[0]
    image = encoder.encode_images([drawing("blue", "circle")])[0]
    assert np.abs(rows - np.stack([text, image, text])).max() < 1e-5
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    assert answer["object"] == "list"
    assert answer["usage"]["total_tokens"] == 2 * 5  # start, a, red, circle, end


def test_the_scheme_of_a_data_url_is_of_any_case(client: TestClient) -> None:
    """DATA:image/… was embedded as words."""
    url = data_url(picture("blue"))
    loud = url.replace("data:image", "DATA:Image")
    answer = client.post("/v1/embeddings", json={"input": [url, loud]}).json()
    first, second = (entry["embedding"] for entry in answer["data"])
    assert first == second


def test_a_data_url_is_an_image_whatever_its_type_or_blanks_before_it_say(
    client: TestClient,
) -> None:
    """Such were embedded as words."""
    url = data_url(picture("blue"))
    others = [" " + url, url.replace("image/png", "application/octet-stream")]
    answer = client.post("/v1/embeddings", json={"input": [url, *others, "data: of 2019"]}).json()
    first, second, third, words = (entry["embedding"] for entry in answer["data"])
    assert first == second == third != words


@pytest.mark.parametrize("text", ["stop!~", "!-) smile", "cat !@#", "wow!(apple)!", "!", "red!"])
def test_exclamation_marks_within_a_text_are_no_padding(
    client: TestClient, encoder: Encoder, text: str
) -> None:
    """Their token within a word is 0, and was dropped."""
    answer = client.post("/v1/embeddings", json={"input": ["red", text]}).json()
    row = np.array(answer["data"][1]["embedding"], np.float32)
    assert np.abs(row - encoder.encode_texts([text])[0]).max() < 1e-5


def test_a_text_is_tokenized_once(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was tokenized again to count what it cost."""
    tokenized: list[str] = []
    tokenize = Encoder.tokenize

    def watched(self: Encoder, texts: list[str]) -> np.ndarray:
        tokenized.extend(texts)
        return tokenize(self, texts)

    monkeypatch.setattr(Encoder, "tokenize", watched)
    client.post("/v1/embeddings", json={"input": ["a circle", "seen by nobody"]})
    assert tokenized == ["a circle", "seen by nobody"]


def test_base64_embeddings_are_the_same_floats(client: TestClient) -> None:
    floats = client.post("/v1/embeddings", json={"input": "a circle"}).json()
    packed = client.post(
        "/v1/embeddings", json={"input": "a circle", "encoding_format": "base64"}
    ).json()
    row = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert np.allclose(row, floats["data"][0]["embedding"], atol=1e-7)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "body.input"),
        ({"input": []}, "body.input"),
        ({"input": [{}]}, "body.input"),
        ({"input": [320, 736]}, "body.input: token ids are not understood"),
        ({"input": [[320, 736], [1]]}, "body.input: token ids are not understood"),
        ({"input": ["data:text/plain;base64,YQ=="]}, "input.0: not a readable image"),
        ({"input": "x", "encoding_format": "hex"}, "body.encoding_format"),
        ({"input": "x", "dimensions": 7}, "dimensions: this model has 16, found 7"),
        ({"input": ["x", "data:image/png,plain"]}, "input.1: of the data URLs only base64"),
        ({"input": ["data:image/png;base64,%%%%"]}, "input.0: the data URL is not valid base64"),
        ({"input": ["x"] * 65}, "65 inputs"),
        ({"input": "x" * 2001}, "2001 characters"),
        ({"input": "\ud800"}, "body.input"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    client: TestClient, body: dict[str, Any], named: str
) -> None:
    answer = client.post(
        "/v1/embeddings",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert named in problem(answer, 422)
