"""The contract of the API, asked of a real server process on loopback."""

import base64
import hashlib
import io
import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serving.__main__ import main
from tests.serving.conftest import Server, running
from tests.serving.wire import data_url, problem
from tests.support import COLOURS, drawing, encoded, tiny_bundle
from vlm.inference import Encoder

RED = encoded(drawing("red", "circle"))
BLUE = encoded(drawing("blue", "square"), "JPEG")


def test_probes_answer(server: Server) -> None:
    assert server.client.get("/healthz").json() == {"status": "alive"}
    assert server.client.get("/readyz").json() == {"status": "ready"}


def test_embeddings_equal_the_encoders_to_1e5(server: Server, bundle: Path) -> None:
    encoder = Encoder.load(bundle)
    inputs = ["a red circle", data_url(RED), "blue", data_url(BLUE)]
    answer = server.client.post("/v1/embeddings", json={"input": inputs, "model": "tiny"}).json()
    rows = np.array([entry["embedding"] for entry in answer["data"]])
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in (RED, BLUE)]
    np.testing.assert_allclose(rows[[1, 3]], encoder.encode_images(images), atol=1e-5)
    np.testing.assert_allclose(
        rows[[0, 2]], encoder.encode_texts(["a red circle", "blue"]), atol=1e-5
    )
    assert answer["object"] == "list"
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 8, "total_tokens": 8}  # with start and end marks
    assert answer["model"] == encoder.fingerprint


def test_base64_embeddings_are_the_same_numbers(server: Server) -> None:
    ask = {"input": "blue"}
    plain = server.client.post("/v1/embeddings", json=ask).json()["data"][0]["embedding"]
    coded = server.client.post("/v1/embeddings", json={**ask, "encoding_format": "base64"}).json()
    found = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), np.float32)
    np.testing.assert_allclose(found, plain, atol=1e-7)


def test_classification_is_a_softmax_over_the_models_own_scale(
    server: Server, bundle: Path
) -> None:
    encoder = Encoder.load(bundle)
    labels = list(COLOURS)
    body = {"images": [data_url(RED), data_url(BLUE)], "labels": labels, "top_k": 3}
    answer = server.client.post("/v1/classify", json=body).json()
    image = encoder.encode_images([drawing("red", "circle")])
    logits = encoder.info.logit_scale * (image @ encoder.encode_texts(labels).T)[0].astype(float)
    expected = np.exp(logits) / np.exp(logits).sum()
    predictions = answer["results"][0]["predictions"]
    assert [p["label"] for p in predictions] == [labels[i] for i in np.argsort(-logits)[:3]]
    np.testing.assert_allclose(
        [p["probability"] for p in predictions], np.sort(expected)[::-1][:3], atol=1e-4
    )
    assert len(answer["results"]) == 2


def test_an_upload_classifies_like_json(server: Server) -> None:
    fields = {"labels": ["red", "blue"], "templates": ["a {}", "the {} one"]}
    upload = server.client.post(
        "/v1/classify", files=[("images", ("x.png", RED, "image/png"))], data=fields
    )
    body = {"images": [base64.b64encode(RED).decode()], **fields}
    assert upload.json() == server.client.post("/v1/classify", json=body).json()


def test_independent_classes_need_a_bias(server: Server) -> None:
    body = {"images": [data_url(RED)], "labels": ["a"], "mode": "independent"}
    said = problem(server.client.post("/v1/classify", json=body), 422)
    assert "needs a model with a logit bias" in said
    body = {"classes": ["a"], "mode": "independent"}
    assert problem(server.client.put("/v1/label-sets/unused", json=body), 422) == said
    assert "unused" not in server.client.get("/v1/label-sets").json()["label_sets"]


def test_independent_probabilities_come_from_a_model_with_a_bias(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "b", bias=-3.0)
    with running(f"bundle={tmp_path / 'b'}", f"index={tmp_path / 'i'}") as found:
        body = {"images": [data_url(RED)], "labels": ["a", "b"], "mode": "independent"}
        predictions = found.client.post("/v1/classify", json=body).json()["results"][0][
            "predictions"
        ]
    for prediction in predictions:
        expected = 1 / (1 + np.exp(3.0 - prediction["score"] / 0.07))
        assert prediction["probability"] == pytest.approx(expected, abs=1e-4)


def add(server: Server, **item: Any) -> str:
    answer = server.client.post("/v1/items", json={"items": [item]})
    assert answer.status_code == 201, answer.text
    found: str = answer.json()["ids"][0]
    return found


def test_items_are_found_by_text_by_image_and_by_item(server: Server, bundle: Path) -> None:
    encoder = Encoder.load(bundle)
    for colour in COLOURS:
        image = encoded(drawing(colour, "square"))
        add(server, id=f"sq/{colour}", image=data_url(image), text=f"a {colour} square",
            metadata={"shape": "square", "colour": colour})  # fmt: skip
    image_rows = encoder.encode_images([drawing(c, "square") for c in COLOURS])
    order = np.argsort(-(image_rows @ encoder.encode_texts(["red"])[0]), kind="stable")
    ask = {"text": "red", "limit": 8, "filter": {"shape": "square"}}
    answer = server.client.post("/v1/search", json=ask).json()
    assert [hit["metadata"]["colour"] for hit in answer["results"]] == [COLOURS[i] for i in order]
    assert answer["items"] >= 8
    by_image = server.client.post(
        "/v1/search", files={"image": encoded(drawing("green", "square"))},
        data={"limit": "1", "filter": json.dumps({"shape": "square"})},
    ).json()["results"]  # fmt: skip
    assert [hit["id"] for hit in by_image] == ["sq/green"]
    assert by_image[0]["score"] == pytest.approx(1.0, abs=1e-5)
    similar = server.client.post("/v1/search", json={"id": "sq/green", "limit": 3}).json()[
        "results"
    ]
    assert len(similar) == 3
    assert "sq/green" not in [hit["id"] for hit in similar]


def test_an_item_has_a_picture_and_can_be_removed(server: Server) -> None:
    item_id = add(server, image=data_url(RED), metadata={"a": [1, {"b": None}]})
    assert add(server, image=data_url(RED)) == item_id  # the id is a hash of the content
    found = server.client.get(f"/v1/items/{item_id}").json()
    assert (found["id"], found["text"]) == (item_id, None)
    picture = server.client.get(found["thumbnail"])
    assert picture.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(picture.content)).size == (32, 32)
    assert server.client.delete(f"/v1/items/{item_id}").status_code == 204
    assert "no item" in problem(server.client.get(f"/v1/items/{item_id}"), 404)
    assert "no item" in problem(server.client.delete(f"/v1/items/{item_id}"), 404)
    text_id = add(server, text="only words")
    assert "no picture" in problem(server.client.get(f"/v1/items/{text_id}/thumbnail"), 404)


def test_an_upload_stores_one_item(server: Server) -> None:
    answer = server.client.post(
        "/v1/items", files={"image": RED},
        data={"id": "up", "text": "x", "metadata": '{"style": "drawn"}'},
    )  # fmt: skip
    assert answer.json() == {"ids": ["up"]}
    assert server.client.get("/v1/items/up").json()["metadata"] == {"style": "drawn"}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/classify", {"images": [], "labels": ["a"]}, "body.images"),
        ("/v1/classify", {"labels": ["a"]}, "body.images: is missing"),
        ("/v1/classify", {"images": ["%%"], "labels": ["a"]}, "body.images.0"),
        ("/v1/classify", {"images": ["aGk="], "labels": ["a"]}, "images.0: not a readable image"),
        ("/v1/classify", {"images": [data_url(RED)], "labels": [""]}, "body.labels.0"),
        (
            "/v1/classify",
            {"images": [data_url(RED)], "labels": ["a"], "templates": ["x"]},
            "has no {}",
        ),
        ("/v1/classify", {"images": [data_url(RED)], "labels": ["a"] * 2001}, "at most 2000"),
        ("/v1/embeddings", {"input": []}, "body.input"),
        ("/v1/embeddings", {"input": "data:image/png;base64,%%"}, "input.0: the data URL"),
        ("/v1/embeddings", {"input": ["a"] * 65}, "65 inputs in one request; at most 64"),
        ("/v1/embeddings", {"input": "x" * 3000}, "at most 2000"),
        ("/v1/search", {}, "exactly one of text, image and id"),
        ("/v1/search", {"text": "a", "id": "b"}, "exactly one of text, image and id"),
        ("/v1/search", {"text": "a", "limit": 0}, "body.limit"),
        ("/v1/search", {"text": "a", "filter": {"k": [1]}}, "body.filter.k"),
        ("/v1/search", {"txet": "a"}, "body.txet"),
        ("/v1/items", {"items": [{}]}, "items.0: needs an image or a text"),
        ("/v1/items", {"items": []}, "body.items"),
    ],
)
def test_a_wrong_request_names_the_field_or_the_reason(
    server: Server, path: str, body: dict[str, Any], said: str
) -> None:
    assert said in problem(server.client.post(path, json=body), 422)


def test_a_missing_item_or_path_is_a_404(server: Server) -> None:
    problem(server.client.post("/v1/search", json={"id": "nobody"}), 404)
    problem(server.client.get("/v1/nothing"), 404)
    problem(server.client.get("/v1/search"), 405)


def test_bodies_that_are_not_understood_are_refused(server: Server) -> None:
    client = server.client
    json_type = {"content-type": "application/json"}
    problem(client.post("/v1/search", content=b"{", headers=json_type), 422)
    problem(client.post("/v1/search", content=b"[" * 100_000, headers=json_type), 422)
    problem(client.post("/v1/search", content=b"x", headers={"content-type": "text/plain"}), 415)


def test_an_image_over_the_pixel_limit_is_refused(server: Server) -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    body = {"images": [data_url(bomb)], "labels": ["a"]}
    assert "over the limit" in problem(server.client.post("/v1/classify", json=body), 422)


def test_a_tiny_image_harms_nobody(server: Server) -> None:
    body = {"images": [data_url(encoded(Image.new("RGB", (1, 1))))], "labels": ["a"]}
    assert server.client.post("/v1/classify", json=body).status_code == 200
    assert server.client.get("/readyz").status_code == 200


def test_a_body_over_the_limit_is_refused_while_it_streams(bundle: Path, tmp_path: Path) -> None:
    with running(f"bundle={bundle}", f"index={tmp_path}", "max_body_bytes=10000") as found:
        assert "10000 bytes" in problem(
            found.client.post("/v1/search", json={"text": "x" * 11_000}), 413
        )
        host, port = found.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(
                b"POST /v1/search HTTP/1.1\r\nhost: localhost\r\n"
                b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            for _ in range(3):
                raw.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            assert b" 413 " in raw.recv(4096)
        assert found.client.get("/healthz").status_code == 200


def test_keys_are_asked_for_where_they_are_set(bundle: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    with running(f"bundle={bundle}", f"index={tmp_path}", f"api_key_sha256=['{digest}']") as found:
        client = found.client
        problem(client.get("/v1/model"), 401)
        problem(client.get("/v1/model", headers={"authorization": "Bearer wrong"}), 401)
        problem(client.get("/v1/model", headers={"authorization": "Basic secret"}), 401)
        assert (
            client.get("/v1/model", headers={"authorization": "Bearer secret"}).status_code == 200
        )
        assert client.get("/readyz").status_code == 200
    assert "secret" not in "".join(found.output)


def test_pages_of_other_sites_are_refused(server: Server) -> None:
    other = {"origin": "http://evil.example"}
    answer = server.client.post("/v1/search", json={"text": "a"}, headers=other)
    assert "another site" in problem(answer, 403)
    own = {"origin": server.url}
    assert server.client.post("/v1/search", json={"text": "a"}, headers=own).status_code == 200


def test_every_answer_carries_safe_headers(server: Server) -> None:
    for path in ("/", "/healthz", "/v1/nothing"):
        headers = server.client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


def test_the_model_is_described(server: Server, bundle: Path) -> None:
    model = server.client.get("/v1/model").json()
    assert model["fingerprint"] == Encoder.load(bundle).fingerprint
    assert (model["name"], model["dim"], model["image_size"]) == ("tiny", 16, 32)


def test_the_api_is_described_and_browsable_without_other_hosts(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    assert {
        "/v1/classify",
        "/v1/embeddings",
        "/v1/search",
        "/v1/items",
        "/healthz",
        "/readyz",
    } <= set(document["paths"])
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in document["components"]["schemas"]
    page = server.client.get("/docs").text
    assert "http" not in page.replace("http-equiv", "")


def test_items_survive_kill_9_and_a_restart(bundle: Path, tmp_path: Path) -> None:
    settings = (f"bundle={bundle}", f"index={tmp_path}")
    with running(*settings) as first:
        ids = [add(first, id=f"k{n}", text=f"text {n}") for n in range(7)]
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    with running(*settings) as second:
        for item_id in ids:
            assert second.client.get(f"/v1/items/{item_id}").status_code == 200
        assert second.client.post("/v1/search", json={"text": "text 3"}).json()["items"] == 7


def _accepts(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=60).close()
    except ConnectionError:
        return False
    return True


def test_sigterm_finishes_requests_in_flight(bundle: Path, tmp_path: Path) -> None:
    with running(f"bundle={bundle}", f"index={tmp_path}") as found:
        address = (found.client.base_url.host, found.client.base_url.port or 0)
        body = json.dumps({"input": "a red circle"}).encode()
        with socket.create_connection(address, timeout=60) as raw:
            raw.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            )
            assert b"100 Continue" in raw.recv(4096)  # the route waits for the body
            found.process.terminate()
            while _accepts(address):
                pass
            raw.sendall(body)
            answer = raw.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b"connection: close" in answer.partition(b"\r\n\r\n")[0].lower()
        assert found.stop() in (0, -signal.SIGTERM)


def test_an_index_of_another_model_is_refused_at_start(bundle: Path, tmp_path: Path) -> None:
    with running(f"bundle={bundle}", f"index={tmp_path / 'i'}"):
        pass
    tiny_bundle(tmp_path / "other", seed=7)
    with pytest.raises(AssertionError, match="cannot start: .*holds vectors of model") as caught:
        Server("--bundle", str(tmp_path / "other"), "--index", str(tmp_path / "i"))
    assert "Traceback" not in str(caught.value)


def test_several_processes_answer_alike_and_end_together(bundle: Path, tmp_path: Path) -> None:
    with running(f"bundle={bundle}", f"index={tmp_path}", "workers=2") as found:
        address = (found.client.base_url.host, found.client.base_url.port or 0)
        end = time.monotonic() + 240
        while not _accepts(address) and time.monotonic() < end:
            time.sleep(0.1)  # the port is named before a process listens on it
        ids = [add(found, id=f"w{n}", text=f"text {n}") for n in range(4)]
        stored = found.client.put("/v1/label-sets/shared", json={"classes": ["a"]}).json()
        for item_id in ids:
            with httpx.Client(base_url=found.url, timeout=60) as client:
                assert client.get(f"/v1/items/{item_id}").status_code == 200
                assert client.get("/v1/label-sets/shared").json() == stored
        answer = found.client.post("/v1/models/tiny/unload")
        assert "2 processes serve here" in problem(answer, 409)
        assert found.stop() in (0, -signal.SIGTERM)


def test_a_wrong_setting_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "serving.yaml"
    config.write_text("max_bacth: 3\napi_key_sha256: [plain]\n")
    monkeypatch.setenv("VLM_SERVING_CONFIG", str(config))
    monkeypatch.setattr("sys.argv", ["serving", "port=99999"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "max_bacth: no such key; did you mean 'max_batch'?" in said
    assert "port: Input should be less than or equal to 65535" in said
    assert "64 hex digits" in said
