import base64
import io
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from serving.app import create_app
from serving.settings import ServingSettings
from tests.serving.wire import data_url, picture, problem
from tests.support import drawing, tiny_bundle
from vlm.inference import Encoder, class_embeddings, exclusive_probabilities

LABELS = ["red circle", "blue square", "green circle"]


def test_classify_gives_the_softmax_of_the_encoders_cosines(
    client: TestClient, encoder: Encoder
) -> None:
    body = {"images": [data_url(picture())], "labels": LABELS, "templates": ["a {}", "the {}"]}
    answer = client.post("/v1/classify", json=body).json()
    classes = class_embeddings(encoder.encode_texts, [[f"a {x}", f"the {x}"] for x in LABELS])
    cosines = encoder.encode_images([drawing("red", "circle")]) @ classes.T
    expected = exclusive_probabilities(cosines, encoder.info.logit_scale)[0]
    found = {p["label"]: p["probability"] for p in answer["results"][0]["predictions"]}
    assert answer["model"] == encoder.fingerprint
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert [found[label] for label in LABELS] == pytest.approx(expected.tolist(), abs=1e-5)


def test_classify_answers_alike_to_json_and_uploads(client: TestClient) -> None:
    two = [picture("red"), picture("blue", "square")]
    by_json = client.post(
        "/v1/classify",
        json={
            "images": [data_url(two[0]), base64.b64encode(two[1]).decode()],
            "labels": LABELS,
            "templates": ["{}"],
        },
    )
    by_upload = client.post(
        "/v1/classify",
        files=[("images", ("a.png", two[0])), ("images", ("b.exe", two[1]))],
        data={"labels": LABELS, "templates": "{}"},
    )
    assert by_json.status_code == by_upload.status_code == 200
    assert by_json.json() == by_upload.json()
    assert len(by_json.json()["results"]) == 2


def test_top_k_keeps_the_best_and_best_first(client: TestClient) -> None:
    body = {"images": [data_url(picture())], "labels": LABELS, "top_k": 2}
    predictions = client.post("/v1/classify", json=body).json()["results"][0]["predictions"]
    probabilities = [p["probability"] for p in predictions]
    assert len(probabilities) == 2
    assert probabilities == sorted(probabilities, reverse=True)


def test_all_of_more_labels_than_a_thousand_can_be_asked_for(client: TestClient) -> None:
    labels = [f"thing {n}" for n in range(1500)]
    body = {"images": [data_url(picture())], "labels": labels, "top_k": 1500}
    (result,) = client.post("/v1/classify", json=body).json()["results"]
    assert sorted(p["label"] for p in result["predictions"]) == sorted(labels)


def test_base64_may_be_wrapped_into_lines(client: TestClient) -> None:
    """`base64 FILE` wraps, and that was "neither base64 nor a data URL"."""
    wrapped = base64.encodebytes(picture()).decode()
    assert wrapped.count("\n") > 1
    for image in (wrapped, " data:image/png;base64,\r\n" + wrapped.replace("\n", "\r\n")):
        answer = client.post("/v1/classify", json={"images": [image], "labels": LABELS})
        assert answer.status_code == 200, answer.text


def test_independent_labels_need_a_model_with_a_bias(client: TestClient, tmp_path: Path) -> None:
    body = {"images": [data_url(picture())], "labels": LABELS, "mode": "independent"}
    assert "sigmoid" in problem(client.post("/v1/classify", json=body), 422)
    tiny_bundle(tmp_path / "bundle", bias=-10.0)
    config = ServingSettings(bundle=tmp_path / "bundle", index=tmp_path / "index")
    with TestClient(create_app(config), base_url="http://127.0.0.1") as sigmoid:
        predictions = sigmoid.post("/v1/classify", json=body).json()["results"][0]["predictions"]
    assert sum(p["probability"] for p in predictions) < 0.1  # the bias says: hardly any holds


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels": []}, "body.labels"),
        ({"labels": [""]}, "body.labels.0"),
        ({"labels": ["a", "b", "a"]}, "the label 'a' is given twice"),
        ({"labels": ["x" * 2001]}, "2001 characters of a label or template"),
        ({"templates": ["{}" + "x" * 2000]}, "2002 characters of a label or template"),
        ({"templates": ["no place"]}, "no {} where the label goes"),
        ({"images": []}, "body.images"),
        ({"images": ["%%%"]}, "body.images.0"),
        ({"images": [data_url(picture()), data_url(b"garbage")]}, "images.1: not a readable image"),
        ({"images": [data_url(picture()[:60])]}, "images.0: not a readable image"),
        ({"images": [data_url(picture())] * 65}, "65 images"),
        ({"labels": [str(n) for n in range(2001)]}, "2001 prompts"),
        ({"top_k": 0}, "body.top_k"),
        ({"mode": "both"}, "body.mode"),
        ({"colour": 1}, "body.colour"),
    ],
)
def test_what_cannot_be_classified_is_refused_by_name(
    client: TestClient, change: dict[str, Any], named: str
) -> None:
    body = {"images": [data_url(picture())], "labels": LABELS, **change}
    assert named in problem(client.post("/v1/classify", json=body), 422)


def test_a_pixel_bomb_is_refused_before_it_is_decoded(client: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 100_000
    answer = client.post("/v1/search", files={"image": buffer.getvalue()})
    detail = problem(answer, 422)
    assert "image: the image is" in detail
    assert "over the limit of 50000000 pixels; make it smaller" in detail
    assert "178956970" not in detail  # Pillow's own limit, twice of which it is over
