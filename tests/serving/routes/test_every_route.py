import base64
import json
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.wire import JSON, picture, problem
from vlm.inference import Encoder


@pytest.mark.parametrize(
    "path", ["caption", "classify", "embeddings", "search", "similarity", "items"]
)
def test_a_body_that_is_not_understood_gets_told_what_is(client: TestClient, path: str) -> None:
    deep = "[" * 100_000
    for text in ("{", "[]", "null", "1e5", deep):
        problem(client.post(f"/v1/{path}", content=text, headers=JSON), 422)
    answer = client.post(f"/v1/{path}", content="a=b", headers={"content-type": "text/plain"})
    assert "application/json" in problem(answer, 415)
    answer = client.post(
        f"/v1/{path}", content=b"--", headers={"content-type": "multipart/form-data"}
    )
    problem(answer, 400)


MANY: list[tuple[str, dict[str, Any]]] = [
    ("v1/embeddings", {"input": [1]}),
    ("v1/classify", {"images": [1], "labels": ["a"]}),
    ("v1/classify", {"images": ["aGk="], "labels": [""]}),
    ("v1/caption", {"images": [1]}),
    ("v1/similarity", {"queries": [""], "candidates": ["a"]}),
    ("v1/search", {"parts": [1]}),
    ("v1/search", {"vector": ["a"]}),
    ("v1/items", {"items": [1]}),
    ("v2/models/tiny/infer", {"inputs": [1]}),
]


@pytest.mark.parametrize(("path", "body"), MANY, ids=lambda value: str(value)[:40])
def test_a_list_of_a_million_mistakes_costs_what_one_does(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    wrong = next(name for name in body if name != "images" or body[name] == [1])
    many = {**body, wrong: body[wrong] * 1_000_000}
    answer = client.post(f"/{path}", content=json.dumps(many), headers=JSON)
    assert answer.status_code in (400, 422)
    assert len(answer.text) < 1000, answer.text[:2000]


def test_an_object_of_many_keys_is_refused_whole(client: TestClient) -> None:
    body = json.dumps({"input": "a", **{f"key {n}": n for n in range(5000)}})
    said = problem(client.post("/v1/embeddings", content=body, headers=JSON), 422)
    assert said == "body: an object of 5001 keys; at most 4096 are understood"


def test_a_compressed_body_is_named_as_such(client: TestClient) -> None:
    headers = {**JSON, "content-encoding": "gzip"}
    answer = client.post("/v1/embeddings", content=b"\x1f\x8b", headers=headers)
    assert "content encoding 'gzip' is not understood" in problem(answer, 415)


def test_an_upload_that_was_cut_off_is_not_taken_for_a_whole_one(client: TestClient) -> None:
    parts = [b'name="labels"\r\n\r\nred', b'name="labels"\r\n\r\nblue']
    parts.insert(0, b'name="images"; filename="a.png"\r\n\r\n' + picture())
    whole = b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts)
    headers = {"content-type": "multipart/form-data; boundary=b"}
    found = client.post("/v1/classify", content=whole + b"--b--\r\n", headers=headers)
    assert len(found.json()["results"][0]["predictions"]) == 2
    for cut in (whole, whole[:-20]):
        answer = client.post("/v1/classify", content=cut, headers=headers)
        assert "the upload was cut off" in problem(answer, 400)


def test_a_large_image_may_be_text_in_an_upload_too(client: TestClient) -> None:
    """Parts that are no files had a limit of their own, 1 MiB."""
    image = base64.b64encode(picture() + bytes(2**20)).decode()
    form = {"images": image, "labels": ["red", "blue"]}
    answer = client.post("/v1/classify", data=form, files={"unused": b""})
    assert "body.unused" in problem(answer, 422)
    answer = client.post("/v1/classify", data={"labels": ["red"]}, files={"images": (None, image)})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("charset", ["punycode", "undefined"])
def test_a_charset_that_fits_no_upload_is_refused(client: TestClient, charset: str) -> None:
    """It was a defect of the server."""
    body = b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\nred\r\n--b--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    answer = client.post("/v1/search", content=body, headers=headers)
    assert "charset of the upload" in problem(answer, 415)


@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=300), cut=st.integers(0, 200))
def test_no_bytes_of_an_image_are_a_defect_of_the_server(
    client: TestClient, data: bytes, cut: int
) -> None:
    damaged = picture()[:cut] + data
    answer = client.post("/v1/search", files={"image": damaged})
    assert answer.status_code in (200, 422), answer.text


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(
    item=st.fixed_dictionaries({"id": JSON_VALUES, "text": JSON_VALUES, "metadata": JSON_VALUES})
)
def test_no_json_is_a_defect_of_the_server(client: TestClient, item: dict[str, Any]) -> None:
    body = json.dumps({"items": [item]})
    answer = client.post("/v1/items", content=body, headers=JSON)
    assert answer.status_code in (201, 422), answer.text
    if answer.status_code == 201 and not set(item["id"]) & set("/."):  # clients fold dot segments
        path = f"/v1/items/{quote(item['id'], safe='')}"
        assert client.get(path).json()["metadata"] == item["metadata"]
        assert client.delete(path).status_code == 204


def test_the_model_tells_where_it_came_from(client: TestClient, encoder: Encoder) -> None:
    model = client.get("/v1/model").json()
    assert (model["fingerprint"], model["dim"]) == (encoder.fingerprint, 16)
    assert model["metrics"] == {"zero_shot": {}}


def test_the_openapi_document_resolves_and_names_every_route(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {
        "/healthz",
        "/metrics",
        "/readyz",
        "/v1/caption",
        "/v1/classify",
        "/v1/collections",
        "/v1/collections/{name}",
        "/v1/collections/{name}/alias",
        "/v1/collections/{name}/map",
        "/v1/collections/{name}/measure",
        "/v1/embeddings",
        "/v1/items",
        "/v1/items/delete",
        "/v1/items/{item_id}",
        "/v1/items/{item_id}/thumbnail",
        "/v1/label-sets",
        "/v1/label-sets/{name}",
        "/v1/label-sets/{name}/calibrate",
        "/v1/model",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/models/{name}/load",
        "/v1/models/{name}/unload",
        "/v1/search",
        "/v1/similarity",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{name}",
        "/v2/models/{name}/infer",
        "/v2/models/{name}/ready",
    } == set(document["paths"])
    schemas = document["components"]["schemas"]
    references = [
        part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]
    ]
    assert references
    assert set(references) <= set(schemas)
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation.get("summary")


def test_page_docs_and_assets_come_from_this_server_alone(client: TestClient) -> None:
    for path in ("/", "/docs", "/web/app.js", "/web/style.css", "/web/docs.js", "/web/docs.css"):
        answer = client.get(path)
        assert answer.status_code == 200
        if path in ("/", "/docs"):
            assert client.head(path).headers["content-length"] == str(len(answer.content))
            assert "http://" not in answer.text
            assert "https://" not in answer.text
    assert client.get("/web/../app.py").status_code == 404
    assert client.get("/web/%2e%2e/app.py").status_code == 404
