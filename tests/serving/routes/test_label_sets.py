import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from serving.app import create_app
from serving.services.label_sets import Calibration
from serving.settings import ServingSettings
from tests.serving.wire import data_url, picture, problem
from tests.support import COLOURS, describe, drawing, tiny_bundle
from vlm.inference import Encoder, class_embeddings, exclusive_probabilities, normalised
from vlm.inference.temperature import TEMPERATURE_RANGE

SETS = "/v1/label-sets"


@pytest.fixture
def client(bundle: Path, tmp_path: Path) -> Iterator[TestClient]:
    tiny_bundle(tmp_path / "models/other", seed=5)
    settings = ServingSettings(bundle=bundle, index=tmp_path / "i", models=tmp_path / "models")
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        yield client


def put(client: TestClient, name: str, **body: Any) -> dict[str, Any]:
    answer = client.put(f"{SETS}/{name}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def classify(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/classify", json={"images": [data_url(picture())], **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def scores(answer: dict[str, Any]) -> dict[str, float]:
    return {p["label"]: p["score"] for p in answer["results"][0]["predictions"]}


def test_a_set_lives_from_put_to_delete_and_over_a_restart(
    client: TestClient, bundle: Path, tmp_path: Path
) -> None:
    stored = put(client, "colours", classes=list(COLOURS), templates=["a {}", "drawing"])
    assert client.get(SETS).json() == {"label_sets": ["colours"]}
    assert client.get(f"{SETS}/colours").json() == stored
    inline = classify(client, labels=list(COLOURS), templates=["a {}", "drawing"])
    by_name = classify(client, label_set="colours")
    assert scores(by_name) == pytest.approx(scores(inline), abs=1e-5)
    assert (by_name["label_set_version"], by_name["calibrated"]) == (stored["version"], False)
    assert put(client, "colours", classes=["red", "blue"])["version"] != stored["version"]
    settings = ServingSettings(bundle=bundle, index=tmp_path / "i")
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as later:
        assert set(scores(classify(later, label_set="colours"))) == {"red", "blue"}
        assert later.delete(f"{SETS}/colours").status_code == 204
    problem(client.get(f"{SETS}/colours"), 404)
    problem(client.delete(f"{SETS}/colours"), 404)
    problem(client.post("/v1/classify", json=body(label_set="colours")), 404)


def body(**more: Any) -> dict[str, Any]:
    return {"images": [data_url(picture())], **more}


def test_a_damaged_set_can_be_removed(client: TestClient) -> None:
    client.put("/v1/label-sets/torn", json={"classes": ["a", "b"]})
    app = client.app
    assert isinstance(app, FastAPI)
    folder = app.state.services.settings.label_sets_folder
    (folder / "torn.json").write_text("{")
    assert "damaged" in problem(client.get("/v1/label-sets/torn"), 422)
    assert client.delete("/v1/label-sets/torn").status_code == 204
    problem(client.delete("/v1/label-sets/torn"), 404)


def test_rows_are_those_of_the_model_that_is_asked(client: TestClient, tmp_path: Path) -> None:
    put(client, "colours", classes=list(COLOURS))
    before = scores(classify(client, label_set="colours"))
    client.post("/v1/models/tiny/load", json={"bundle": "other"})
    other = Encoder.load(tmp_path / "models/other")
    rows = other.encode_texts(list(COLOURS)) @ other.encode_images([drawing("red", "circle")])[0]
    after = scores(classify(client, label_set="colours"))
    assert [after[c] for c in COLOURS] == pytest.approx(rows.tolist(), abs=1e-5)
    assert after != before


def test_classes_by_images_are_their_mean_and_mix_with_words(
    client: TestClient, encoder: Encoder
) -> None:
    shown = {c: [drawing(c, s) for s in ("circle", "square")] for c in ("red", "blue")}
    for weight in (1.0, 0.25):
        classes = [
            {"label": c, "images": [data_url(png(i)) for i in images], "image_weight": weight}
            for c, images in shown.items()
        ]
        put(client, "shapes", classes=classes)
        pictures = class_rows(encoder, list(shown.values()))
        words = encoder.encode_texts(list(shown))
        rows = normalised(weight * pictures + (1 - weight) * words)
        expected = rows @ encoder.encode_images([drawing("red", "circle")])[0]
        found = scores(classify(client, label_set="shapes"))
        assert [found[c] for c in shown] == pytest.approx(expected.tolist(), abs=1e-5)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def class_rows(encoder: Encoder, images: list[list[Image.Image]]) -> np.ndarray:
    means = [encoder.encode_images(some).mean(axis=0, keepdims=True) for some in images]
    return normalised(np.concatenate(means))


def test_words_beside_images_need_to_know_where_the_modalities_lie(
    client: TestClient, encoder: Encoder, tmp_path: Path
) -> None:
    classes = ["red", {"label": "blue", "images": [data_url(picture("blue"))], "image_weight": 1}]
    refused = client.put(f"{SETS}/both", json={"classes": classes})
    assert "no modality means" in problem(refused, 422)
    means: dict[str, Any] = {"image": [0.1] * 16, "text": [-0.2] * 16, "num_pairs": 9}
    describe(tmp_path / "models/other", modality_means=means)
    client.post("/v1/models/other/load")
    put(client, "both", classes=classes)  # one of the models can answer
    said = problem(client.post("/v1/classify", json=body(label_set="both")), 422)
    assert "no modality means" in said
    other = Encoder.load(tmp_path / "models/other")
    moved = normalised(other.encode_images([drawing("blue", "circle")]) - 0.3)[0]
    found = scores(classify(client, label_set="both", model="other"))
    row = other.encode_images([drawing("red", "circle")])[0]
    assert found["blue"] == pytest.approx(float(moved @ row), abs=1e-5)


def test_examples_are_kept_without_metadata(client: TestClient, tmp_path: Path) -> None:
    put(
        client, "one", classes=[{"label": "a", "images": [data_url(png(drawing("red", "circle")))]}]
    )
    (stored,) = (tmp_path / "i-label-sets").glob("*.json")
    kept = base64.b64decode(json.loads(stored.read_text())["classes"][0]["images"][0])
    assert b"taken at home" not in kept
    assert not Image.open(io.BytesIO(kept)).getexif()


def labelled(count: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {
            "image": data_url(picture(COLOURS[n % 8], ("circle", "square")[n // 8 % 2])),
            "label": COLOURS[int(random.integers(3))] if n % 4 else None,
        }
        for n in range(count)
    ]


def test_a_calibration_is_kept_used_for_its_model_and_dropped_with_its_version(
    client: TestClient, encoder: Encoder
) -> None:
    put(client, "colours", classes=list(COLOURS[:3]))
    answer = client.post(f"{SETS}/colours/calibrate", json={"samples": labelled(32)})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["model"], found["num_samples"], found["num_none"]) == (encoder.fingerprint, 32, 8)
    assert found["ece_after"] < found["ece_before"]
    assert "hardly anything right" in found["note"]  # the labels are drawn
    assert 0 <= found["none_threshold"] <= 1
    asked = classify(client, label_set="colours")
    cosines = (
        encoder.encode_images([drawing("red", "circle")])
        @ class_embeddings(encoder.encode_texts, [[c] for c in COLOURS[:3]]).T
    )
    scale = encoder.info.logit_scale / found["temperature"]
    expected = exclusive_probabilities(cosines, scale)[0]
    probability = {p["label"]: p["probability"] for p in asked["results"][0]["predictions"]}
    assert [probability[c] for c in COLOURS[:3]] == pytest.approx(expected.tolist(), abs=1e-4)
    assert asked["calibrated"]
    none = bool(expected.max() < found["none_threshold"])
    assert asked["results"][0]["none_of_these"] is none
    assert classify(client, label_set="colours", none_threshold=1.0)["results"][0]["none_of_these"]
    put(client, "colours", classes=list(COLOURS[:3]), none_threshold=0.0)  # the same version
    asked = classify(client, label_set="colours")
    assert (asked["calibrated"], asked["results"][0]["none_of_these"]) == (True, False)
    client.post("/v1/models/tiny/load", json={"bundle": "other"})
    assert not classify(client, label_set="colours")["calibrated"]
    assert put(client, "colours", classes=["red", "blue"])["calibrations"] == []


def test_a_sample_without_a_mistake_is_said_to_settle_no_temperature(client: TestClient) -> None:
    put(client, "sure", classes=list(COLOURS[:2]))
    shown = classify(client, label_set="sure")["results"][0]["predictions"][0]["label"]
    samples = [{"image": data_url(picture("red", "circle")), "label": shown}] * 2
    answer = client.post(f"{SETS}/sure/calibrate", json={"samples": samples}).json()
    assert answer["temperature"] == pytest.approx(TEMPERATURE_RANGE[0], rel=1e-3)
    assert "calibrate with more images" in answer["note"]
    (other,) = {"red", "green"} - {shown}
    samples = [*samples, samples[0], {**samples[0], "label": other}]
    answer = client.post(f"{SETS}/sure/calibrate", json={"samples": samples}).json()
    assert TEMPERATURE_RANGE[0] < answer["temperature"] < TEMPERATURE_RANGE[1]
    assert answer["note"] is None


def test_a_calibration_that_made_the_error_worse_says_so() -> None:
    found = Calibration(
        temperature=1.2, none_threshold=None, mode="exclusive", num_samples=8, num_none=0,
        accuracy=0.5, ece_before=0.1, ece_after=0.25,
    )  # fmt: skip
    assert found.note is not None
    assert "rose from 0.100 to 0.250" in found.note
    assert found.model_copy(update={"ece_after": 0.1}).note is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"classes": []}, "body.classes"),
        ({"classes": ["red", "red"]}, "the label 'red' is given twice"),
        ({"classes": ["caf\u00e9", " cafe\u0301"]}, "the label 'caf\u00e9' is given twice"),
        ({"templates": ["no place"]}, "is not the name of some: plain, photo, drawing"),
        ({"classes": ["x" * 2001]}, "2001 characters"),
        ({"classes": [str(n) for n in range(2001)]}, "2001 prompts"),
        ({"classes": [{"label": "a", "images": ["bm8="]}]}, "classes.a.images.0: not a readable"),
        ({"classes": [{"label": "a", "image_weight": 2}]}, "image_weight"),
        ({"none_threshold": -1}, "body.none_threshold"),
        ({"mode": "both"}, "body.mode"),
    ],
)
def test_what_cannot_be_a_set_is_refused_by_name(
    client: TestClient, change: dict[str, Any], named: str
) -> None:
    answer = client.put(f"{SETS}/x", json={"classes": ["red"], **change})
    assert named in problem(answer, 422)
    assert client.get(SETS).json() == {"label_sets": []}


def test_names_and_samples_that_do_not_fit_are_refused(client: TestClient, tmp_path: Path) -> None:
    for name in ("..", "a%2fb", ".hidden", "x" * 129, "ä"):
        assert client.put(f"{SETS}/{name}", json={"classes": ["a"]}).status_code in (404, 405, 422)
    assert not (tmp_path / "i-label-sets").exists()
    put(client, "x", classes=["red", "blue"])
    for samples, said in (
        ([{"image": data_url(picture()), "label": "green"}] * 2, "none of the set's labels"),
        ([{"image": data_url(picture()), "label": None}] * 2, "at least 2 samples"),
        ([{"image": "bm8=", "label": "red"}] * 2, "samples.0.image: not a readable image"),
        ([], "body.samples"),
    ):
        answer = client.post(f"{SETS}/x/calibrate", json={"samples": samples})
        assert said in problem(answer, 422)
    both = client.post("/v1/classify", json=body(labels=["a"], label_set="x"))
    assert "exactly one of labels, classes and label_set" in problem(both, 422)
    (tmp_path / "i-label-sets/x.json").write_text("{")
    assert "damaged" in problem(client.get(f"{SETS}/x"), 422)


def test_classes_with_examples_are_asked_about_without_storing_them(client: TestClient) -> None:
    examples = [{"label": c, "images": [data_url(picture(c))]} for c in ("red", "blue")]
    put(client, "shown", classes=examples, templates=["a {}"])
    inline = classify(client, classes=examples, templates=["a {}"])
    assert scores(inline) == pytest.approx(scores(classify(client, label_set="shown")), abs=1e-4)
    assert inline["label_set_version"] is None
    words = classify(client, classes=["red", {"label": "blue"}])
    assert scores(words) == pytest.approx(scores(classify(client, labels=["red", "blue"])))
    ask = "/v1/classify"
    problem(client.post(ask, json=body(classes=["red"], labels=["red"])), 422)
    twice = problem(client.post(ask, json=body(classes=["red", "red"])), 422)
    assert "given twice" in twice
    broken = [{"label": "red", "images": ["AAAA"]}]
    assert "classes.red.images.0" in problem(client.post(ask, json=body(classes=broken)), 422)
    many = [{"label": "red", "images": [data_url(picture())] * 65}]
    assert "at most 64" in problem(client.post(ask, json=body(classes=many)), 422)
