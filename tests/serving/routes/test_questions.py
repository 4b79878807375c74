"""Sums, pages, and other orders of a search, over a gallery of pictures and texts."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.settings import ServingSettings
from serving.stores import EmbeddedStore, Item
from tests.serving.wire import data_url, picture, problem
from tests.support import COLOURS, describe, drawing
from vlm.inference import Encoder

SHAPES = ("circle", "square")
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def rows(encoder: Encoder) -> np.ndarray:
    return encoder.encode_images([drawing(*name.split()) for name in NAMES])


@pytest.fixture(scope="module")
def client(
    bundle: Path, encoder: Encoder, rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    """A gallery of pictures alone, of a bundle that knows the means of its modalities."""
    root = tmp_path_factory.mktemp("questions")
    shutil.copytree(bundle, root / "bundle")
    texts = encoder.encode_texts(NAMES)
    means = {
        "image": rows.mean(axis=0).tolist(), "text": texts.mean(axis=0).tolist(), "num_pairs": 16,
    }  # fmt: skip
    describe(root / "bundle", modality_means=means)
    settings = ServingSettings(bundle=root / "bundle", index=root / "index")
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        items = [
            {"id": name, "image": data_url(picture(*name.split())), "text": f"a {name}",
             "metadata": {"shape": name.split()[1]}}
            for name in NAMES
        ]  # fmt: skip
        assert client.post("/v1/items", json={"items": items}).status_code == 201
        yield client


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/search", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ids(answer: dict[str, Any]) -> list[str]:
    return [hit["id"] for hit in answer["results"]]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_a_plain_text_is_ranked_by_its_cosine_and_a_picture_centred(
    client: TestClient, encoder: Encoder, rows: np.ndarray
) -> None:
    plain = ask(client, text="red", limit=16)
    assert not plain["centred"]
    order = np.argsort(-(rows @ encoder.encode_texts(["red"])[0]))
    assert ids(plain) == [NAMES[n] for n in order]
    similar = ask(client, image=data_url(picture("red", "circle")), limit=16)
    assert similar["centred"]
    moved = unit(rows - rows.mean(axis=0))
    scores = moved @ moved[NAMES.index("red circle")]
    assert ids(similar) == [NAMES[n] for n in np.argsort(-scores)]
    assert similar["results"][1]["score"] == pytest.approx(float(np.sort(scores)[-2]), abs=1e-4)
    raw = ask(client, image=data_url(picture("red", "circle")), limit=16, geometry="raw")
    assert ids(raw) == [NAMES[n] for n in np.argsort(-(rows @ rows[NAMES.index("red circle")]))]


def test_a_text_that_another_process_stores_changes_how_the_gallery_is_ranked(
    client: TestClient, encoder: Encoder
) -> None:
    index = client.app.state.services.settings.index  # type: ignore[attr-defined] # of the app inside
    fingerprint = client.get("/v1/model").json()["fingerprint"]
    other = EmbeddedStore(index, fingerprint=fingerprint, dim=encoder.info.dim)
    assert not ask(client, text="red")["centred"]
    other.upsert([Item(id="words", vector=encoder.encode_texts(["red"])[0], modality="text")])
    assert ask(client, text="red")["centred"]
    other.delete(["words"])
    assert not ask(client, text="red")["centred"]


def test_parts_are_added_up_in_the_centred_space(
    client: TestClient, encoder: Encoder, rows: np.ndarray
) -> None:
    parts = [
        {"id": "red circle"},
        {"image": data_url(picture("blue", "square")), "weight": 0.5},
        {"texts": ["round", "a ball"], "weight": -0.7},
    ]
    answer = ask(client, parts=parts, limit=15)
    images = unit(rows - rows.mean(axis=0))
    texts = encoder.encode_texts(NAMES)
    words = unit(encoder.encode_texts(["round", "a ball"]).mean(axis=0))
    words = unit(words - texts.mean(axis=0))
    query = unit(
        images[NAMES.index("red circle")] + 0.5 * images[NAMES.index("blue square")] - 0.7 * words
    )
    order = [NAMES[n] for n in np.argsort(-(images @ query)) if NAMES[n] != "red circle"]
    assert ids(answer) == order
    vector = {"vector": rows[3].tolist(), "modality": "image"}
    fingerprint = client.get("/v1/model").json()["fingerprint"]
    by_vector = ask(client, parts=[vector], model=fingerprint, limit=1)
    assert ids(by_vector) == [NAMES[3]]


def test_pages_follow_each_other_though_items_come_and_go(client: TestClient) -> None:
    everything = ids(ask(client, text="blue", limit=16))
    seen: list[str] = []
    after = None
    while True:
        page = ask(client, text="blue", limit=5, **({} if after is None else {"after": after}))
        seen += ids(page)
        after = page["next"]
        if after is None:
            break
        first = {"id": "late", "image": data_url(picture("blue", "circle"))}
        client.post("/v1/items", json={"items": [first]})
    client.delete("/v1/items/late")
    assert [item_id for item_id in seen if item_id != "late"] == everything
    assert len(seen) == len(set(seen))


def test_what_is_written_before_a_page_does_not_end_the_next(client: TestClient) -> None:
    """Each item that sorted before the cursor took a place, and a short page ended the search."""
    everything = ids(ask(client, text="blue", limit=16))
    best = everything[0].split()
    page = ask(client, text="blue", limit=4)
    seen = ids(page)
    for number in range(3):
        picture_of = {"id": f"!{number}", "image": data_url(picture(*best))}
        client.post("/v1/items", json={"items": [picture_of]})
    while page["next"]:
        page = ask(client, text="blue", limit=4, after=page["next"])
        seen += ids(page)
    client.post("/v1/items/delete", json={"ids": ["!0", "!1", "!2"]})
    assert [item_id for item_id in seen if item_id[0] != "!"] == everything


def test_words_are_fused_and_diversity_groups_and_hubs_change_the_order(
    client: TestClient,
) -> None:
    fused = ask(client, text="x", words="green square", limit=3)
    assert fused["results"][0]["id"] in ("green square", "green circle")
    assert fused["results"][0]["score"] < 0.05
    assert len(ask(client, text="red", words="green", diversity=0.5, limit=16)["results"]) == 16
    everything = ask(client, text="red", group=0.001, limit=16)["results"]
    assert sum(1 + len(hit["duplicates"]) for hit in everything) == 16
    assert len(everything) < 16
    assert sorted(ids(ask(client, text="red", reduce_hubs=True, limit=16))) == sorted(NAMES)
    assert (
        ids(ask(client, text="red", diversity=0.9, limit=16))[0] == ids(ask(client, text="red"))[0]
    )


def test_scores_are_calibrated_against_the_collection(client: TestClient) -> None:
    hits = ask(client, text="red", calibrate="percentile", limit=16)["results"]
    shares = [hit["calibrated"] for hit in hits]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(15 / 16, abs=0.07)


def test_a_mixed_gallery_is_ranked_together(client: TestClient) -> None:
    client.put("/v1/collections/mixed")
    items = [
        {"id": f"{kind} {name}", "text": f"a {name}", **more}
        for name in NAMES[:4]
        for kind, more in (("picture", {"image": data_url(picture(*name.split()))}), ("note", {}))
    ]
    client.post("/v1/items", params={"collection": "mixed"}, json={"items": items})
    answer = ask(client, text="a red circle", collection="mixed", limit=8)
    assert answer["centred"]
    assert {hit["modality"] for hit in answer["results"]} == {"image", "text"}
    scores = [hit["score"] for hit in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(ids(answer)) == 8


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"parts": []}, 422, "body.parts"),
        ({"parts": [{}]}, 422, "exactly one of text, texts, image"),
        ({"parts": [{"text": "a"}], "text": "b"}, 422, "exactly one of text, image and id, or"),
        ({"parts": [{"text": "a"}, {"text": "a", "weight": -1}]}, 422, "cancel each other out"),
        ({"parts": [{"text": "a"}, {"image": "bm8="}]}, 422, "parts.1.image: not a readable"),
        ({"parts": [{"id": "nobody"}]}, 404, "no item has the id"),
        ({"parts": [{"vector": [1.0]}]}, 422, "model: name the model"),
        ({"parts": [{"vector": [1.0]}], "model": "tiny"}, 422, "must be 16 numbers, not all 0"),
        ({"parts": [{"vector": [0.0] * 16}], "model": "tiny"}, 422, "must be 16 numbers"),
        ({"text": "a", "filter": {"x": "\ud800"}}, 422, "lone surrogate"),
        ({"text": "a", "filter": {"\ud800": 1}}, 422, "lone surrogate"),
        ({"text": "a", "model": "gpt"}, 404, "no model is called"),
        ({"text": "a", "after": "x"}, 422, "after: not what a page before"),
        ({"text": "a", "after": "W10=", "diversity": 0.5}, 422, "after: no further pages"),
        ({"text": "a", "calibrate": "sigmoid"}, 422, "calibrate: this model has no logit bias"),
        ({"text": "a", "words": "b", "calibrate": "percentile"}, 422, "no cosines to calibrate"),
        ({"id": NAMES[0], "reduce_hubs": True}, 422, "ask with geometry raw"),
        ({"text": "a", "words": "x" * 2001}, 422, "2001 characters"),
    ],
)
def test_a_question_that_means_nothing_is_refused_in_words(
    client: TestClient, body: dict[str, Any], status: int, said: str
) -> None:
    content = json.dumps(body)  # which escapes what is no text
    answer = client.post(
        "/v1/search", content=content, headers={"content-type": "application/json"}
    )
    assert said in problem(answer, status)
