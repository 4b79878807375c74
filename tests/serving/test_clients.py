"""Clients that people have already, unchanged, against a real server process on loopback."""

import hashlib
from collections.abc import Iterator

import numpy as np
import openai
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from tests.serving.conftest import Server, running
from tests.serving.wire import data_url, picture
from tests.support import drawing
from vlm.inference import Encoder

TEXTS = ["a red circle", "blau und grün"]


@pytest.fixture
def triton(server: Server) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


def bytes_input(name: str, elements: list[bytes], *, binary: bool = True) -> InferInput:
    tensor = InferInput(name, [len(elements)], "BYTES")
    tensor.set_data_from_numpy(np.array(elements, dtype=object), binary_data=binary)
    return tensor


def test_triton_sees_a_live_ready_server_and_its_model(triton: InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("tiny")
    assert not triton.is_model_ready("large")
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    model = triton.get_model_metadata("tiny")
    assert model["name"] == "tiny"
    assert [tensor["name"] for tensor in model["inputs"]] == ["image", "text"]
    assert model["outputs"][0] == {
        "name": "image_embedding", "datatype": "FP32", "shape": [-1, 16],
    }  # fmt: skip


def test_triton_gets_the_encoders_rows_as_raw_tensors(
    triton: InferenceServerClient, encoder: Encoder
) -> None:
    inputs = [
        bytes_input("image", [picture("red"), picture("blue")]),
        bytes_input("text", [text.encode() for text in TEXTS]),
    ]
    answer = triton.infer("tiny", inputs, request_id="seven")
    assert answer.get_response()["id"] == "seven"
    images = encoder.encode_images([drawing("red", "circle"), drawing("blue", "circle")])
    np.testing.assert_allclose(answer.as_numpy("image_embedding"), images, atol=1e-5)
    rows = answer.as_numpy("text_embedding")
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, encoder.encode_texts(TEXTS), atol=1e-5)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_triton_may_send_and_ask_for_json(
    triton: InferenceServerClient, encoder: Encoder, binary_in: bool, binary_out: bool
) -> None:
    wanted = InferRequestedOutput("text_embedding", binary_data=binary_out)
    texts = bytes_input("text", [text.encode() for text in TEXTS], binary=binary_in)
    answer = triton.infer("tiny", [texts], outputs=[wanted])
    rows = answer.as_numpy("text_embedding")
    np.testing.assert_allclose(rows, encoder.encode_texts(TEXTS), atol=1e-5)
    assert ("data" in answer.get_output("text_embedding")) == (not binary_out)


def test_triton_is_told_in_its_own_words_what_is_wrong(triton: InferenceServerClient) -> None:
    texts = bytes_input("text", [b"red"])
    with pytest.raises(InferenceServerException, match=r"\[404\] no model is called 'large'"):
        triton.infer("large", [texts])
    with pytest.raises(InferenceServerException, match=r"\[400\] image.0: not a readable image"):
        triton.infer("tiny", [bytes_input("image", [b"nothing"])])
    with pytest.raises(InferenceServerException, match="the inputs given lead to text_embedding"):
        triton.infer("tiny", [texts], outputs=[InferRequestedOutput("image_embedding")])
    with pytest.raises(InferenceServerException, match="65 images and texts in one request"):
        triton.infer("tiny", [bytes_input("text", [b"x"] * 65)])
    with pytest.raises(InferenceServerException, match="compressed bodies are not understood"):
        triton.infer("tiny", [texts], request_compression_algorithm="gzip")


def test_openais_client_embeds_texts_and_images_and_lists_the_model(
    server: Server, encoder: Encoder
) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed")
    with client:
        answer = client.embeddings.create(model="tiny", input=["red", data_url(picture("red"))])
        (model,) = client.models.list().data
        listed = (model.id, model.owned_by)
        plain = client.embeddings.create(model="tiny", input="red", encoding_format="float")
        assert client.models.retrieve("tiny") == model
        with pytest.raises(openai.NotFoundError, match="no model is called 'large'"):
            client.models.retrieve("large")
        with pytest.raises(openai.NotFoundError, match="no model is called 'large'"):
            client.embeddings.create(model="large", input="red")
    rows = np.array([entry.embedding for entry in answer.data], np.float32)
    images = encoder.encode_images([drawing("red", "circle")])
    np.testing.assert_allclose(
        rows, np.concatenate([encoder.encode_texts(["red"]), images]), atol=1e-5
    )
    np.testing.assert_allclose(plain.data[0].embedding, rows[0], atol=1e-6)
    assert listed == ("tiny", "vlm")


def test_a_key_is_asked_of_triton_too_but_not_for_its_probes(
    server: Server, tmp_path_factory: pytest.TempPathFactory, encoder: Encoder
) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    bundle = server.settings[0]
    index = tmp_path_factory.mktemp("index")
    with running(bundle, f"index={index}", f"api_key_sha256=[{digest}]") as guarded:
        client = InferenceServerClient(guarded.url.removeprefix("http://"))
        with client:
            assert client.is_server_live()
            assert client.is_server_ready()
            texts = bytes_input("text", [b"red"])
            with pytest.raises(InferenceServerException, match=r"\[401\] this server asks for a k"):
                client.infer("tiny", [texts])
            answer = client.infer("tiny", [texts], headers={"Authorization": "Bearer secret"})
        rows = answer.as_numpy("text_embedding")
    np.testing.assert_allclose(rows, encoder.encode_texts(["red"]), atol=1e-5)
