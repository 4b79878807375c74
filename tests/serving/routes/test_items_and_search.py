import io
import json
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.serving.wire import JSON, Answer, data_url, picture, problem
from tests.support import drawing, encoded
from vlm.inference import Encoder


@pytest.fixture(scope="module")
def stocked(client: TestClient) -> TestClient:
    body = [
        {
            "id": f"{colour} {shape}",
            "image": data_url(picture(colour, shape)),
            "text": f"a {colour} {shape}",
            "metadata": {"colour": colour, "round": shape == "circle"},
        }
        for colour in ("red", "green", "blue", "black")
        for shape in ("circle", "square")
    ]
    answer = client.post("/v1/items", json={"items": body})
    assert answer.status_code == 201
    assert answer.json()["ids"] == [item["id"] for item in body]
    return client


def found(answer: Answer) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [hit["id"] for hit in answer.json()["results"]]


def test_an_image_finds_itself_first_by_json_and_by_upload(stocked: TestClient) -> None:
    image = picture("blue", "square")
    by_json = stocked.post("/v1/search", json={"image": data_url(image), "limit": 3})
    by_upload = stocked.post("/v1/search", files={"image": image}, data={"limit": "3"})
    assert found(by_json)[0] == "blue square"
    assert found(by_json) == found(by_upload)
    scores = [hit["score"] for hit in by_json.json()["results"]]
    assert scores[0] == pytest.approx(1, abs=1e-4)
    assert scores == sorted(scores, reverse=True)
    assert by_json.json()["items"] == 8


def test_a_text_ranks_by_its_cosine_with_the_images(stocked: TestClient, encoder: Encoder) -> None:
    names = [f"{c} {s}" for c in ("red", "green", "blue", "black") for s in ("circle", "square")]
    images = encoder.encode_images([drawing(*name.split()) for name in names])
    cosines = images @ encoder.encode_texts(["something red"])[0]
    hits = found(stocked.post("/v1/search", json={"text": "something red", "limit": 8}))
    assert hits == [names[n] for n in np.argsort(-cosines)]


def test_more_like_this_leaves_the_item_itself_out(stocked: TestClient) -> None:
    hits = found(stocked.post("/v1/search", json={"id": "red circle", "limit": 7}))
    assert len(hits) == 7
    assert "red circle" not in hits
    assert "no item" in problem(stocked.post("/v1/search", json={"id": "absent"}), 404)


def test_a_filter_holds_for_every_result(stocked: TestClient) -> None:
    both = {"colour": "red", "round": True}
    assert found(stocked.post("/v1/search", json={"text": "x", "filter": both})) == ["red circle"]
    upload = stocked.post(
        "/v1/search",
        files={"image": picture()},
        data={"filter": json.dumps({"round": False})},
    )
    assert sorted(found(upload)) == ["black square", "blue square", "green square", "red square"]


def test_filters_are_ranges_sets_and_parts_of_texts(stocked: TestClient) -> None:
    for tree, count in (
        ({"colour": {"in": ["red", "blue"]}}, 4),
        ({"colour": {"contains": "L"}, "round": False}, 2),
        ({"colour": {"gt": 3}}, 0),
        ({"round": True}, 4),
    ):
        assert len(found(stocked.post("/v1/search", json={"text": "x", "filter": tree}))) == count
        listed = stocked.get("/v1/items", params={"filter": json.dumps(tree)}).json()
        assert (len(listed["items"]), listed["total"]) == (count, count)


def test_items_are_listed_page_by_page_and_removed_by_ids_or_filter(client: TestClient) -> None:
    body = [{"id": f"note {n}", "text": f"n {n}", "metadata": {"note": n}} for n in range(5)]
    assert client.post("/v1/items", json={"items": body}).status_code == 201
    mine = json.dumps({"note": {"gte": 0}})
    seen: list[dict[str, Any]] = []
    after: Any = ""
    while after is not None:
        params = {"limit": "2", "after": after, "filter": mine, "vectors": "true"}
        page = client.get("/v1/items", params=params).json()
        seen += page["items"]
        after = page["next"]
    assert [item["id"] for item in seen] == [item["id"] for item in body]
    assert {item["modality"] for item in seen} == {"text"}
    assert np.linalg.norm(seen[0]["vector"]) == pytest.approx(1, abs=1e-5)
    gone = client.post("/v1/items/delete", json={"ids": ["note 0", "absent"]})
    assert gone.json() == {"deleted": 1}
    gone = client.post("/v1/items/delete", json={"filter": {"note": {"gt": 1}}})
    assert gone.json() == {"deleted": 3}
    assert client.get("/v1/items", params={"filter": mine}).json()["total"] == 1
    client.post("/v1/items/delete", json={"ids": ["note 1"]})
    wrong_ones: list[dict[str, Any]] = [{}, {"filter": {}}, {"ids": []}]
    for wrong in [*wrong_ones, {"ids": ["a"], "filter": {"a": 1}}]:
        problem(client.post("/v1/items/delete", json=wrong), 422)
    for text in ("x", "[]", '{"a": {"gt": "x"}}', '{"a": {}}'):
        answer = client.get("/v1/items", params={"filter": text})
        assert "query.filter" in problem(answer, 422)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "exactly one of text, image and id"),
        ({"text": "a", "id": "b"}, "exactly one of text, image and id"),
        ({"text": "a", "limit": 0}, "body.limit"),
        ({"text": "a", "filter": {"x": [1]}}, "body.filter.x"),
        ({"text": "a", "filter": {"x": {"gte": "1990s"}}}, "body.filter.x"),
        ({"text": "a", "filter": {"x": {"like": "a"}}}, "body.filter.x"),
        ({"text": "a", "filter": {str(n): 1 for n in range(65)}}, "65 keys, at most 64"),
        ({"text": "x" * 2001}, "2001 characters"),
        ({"image": "bm8gaW1hZ2U="}, "image: not a readable image"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(
    client: TestClient, body: dict[str, Any], named: str
) -> None:
    assert named in problem(client.post("/v1/search", json=body), 422)


def test_an_item_lives_from_post_to_delete(client: TestClient) -> None:
    name = "shelf/1 \N{RED APPLE}?"
    path = f"/v1/items/{quote(name, safe='')}"
    metadata = {"price": 1.5, "tags": ["a", None]}
    for text in ("first", "second"):  # the second replaces the first
        upload = client.post(
            "/v1/items",
            files={"image": encoded(drawing("red", "circle", size=300), "JPEG")},
            data={"id": name, "text": text, "metadata": json.dumps(metadata)},
        )
        assert (upload.status_code, upload.json()) == (201, {"ids": [name]})
    item = client.get(path).json()
    assert item == {
        "id": name,
        "text": "second",
        "metadata": metadata,
        "thumbnail": f"{path}/thumbnail",
    }
    small = client.get(item["thumbnail"])
    assert small.headers["content-type"] == "image/webp"
    with Image.open(io.BytesIO(small.content)) as image:
        assert image.size == (128, 128)
    assert client.delete(path).status_code == 204
    assert "no item" in problem(client.get(path), 404)
    assert "no item" in problem(client.delete(path), 404)


def test_an_item_without_an_id_is_stored_once_however_often_it_is_sent(client: TestClient) -> None:
    ids = {
        client.post("/v1/items", json={"items": [{"text": "only words"}]}).json()["ids"][0]
        for _ in range(3)
    }
    assert len(ids) == 1
    path = f"/v1/items/{ids.pop()}"
    assert client.get(path).json()["thumbnail"] is None
    assert "no picture" in problem(client.get(f"{path}/thumbnail"), 404)
    client.delete(path)


def nested(depth: int) -> Any:
    """Deep ones were stored, and then every answer that showed them was a 500."""
    return [nested(depth - 1)] if depth else []


def test_metadata_as_deep_as_may_be_comes_back(client: TestClient) -> None:
    item = {"id": "deep", "text": "x", "metadata": {"x": nested(30)}}
    client.post("/v1/items", json={"items": [item]})
    assert client.get("/v1/items/deep").json()["metadata"] == {"x": nested(30)}
    client.delete("/v1/items/deep")


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ({}, "items.1: needs an image or a text"),
        ({"text": " "}, "items.1: needs an image or a text"),
        ({"image": "bm8gaW1hZ2U="}, "items.1.image: not a readable image"),
        ({"text": "x", "id": ""}, "body.items.1.id"),
        # Clients that normalise paths could neither get nor remove them.
        ({"text": "x", "id": "."}, "body.items.1.id: '.' cannot be an id"),
        ({"text": "x", "id": ".."}, "body.items.1.id: '..' cannot be an id"),
        ({"text": "x", "metadata": {"x": "y" * 20_000}}, "body.items.1.metadata"),
        ({"text": "x", "metadata": {"x": "\ud800"}}, "body.items.1.metadata"),
        ({"text": "x", "metadata": [1]}, "body.items.1.metadata"),
        ({"text": "x", "metadata": {"x": nested(32)}}, "at most 32 objects and arrays"),
        ({"text": "x", "id": "good"}, "items.1: the id 'good' is given twice"),
    ],
)
def test_one_bad_item_stores_none_of_its_request(
    client: TestClient, item: dict[str, Any], named: str
) -> None:
    body = json.dumps({"items": [{"id": "good", "text": "good"}, item]})
    assert named in problem(client.post("/v1/items", content=body, headers=JSON), 422)
    assert client.get("/v1/items/good").status_code == 404


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_json_has_not_is_refused(client: TestClient, number: str) -> None:
    body = '{"items": [{"text": "x", "metadata": {"n": ' + number + "}}]}"
    problem(client.post("/v1/items", content=body, headers=JSON), 422)
