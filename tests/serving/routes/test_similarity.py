from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.serving.wire import data_url, picture, problem
from tests.support import drawing
from vlm.inference import Encoder


def test_cosines_are_those_of_the_encoder_whatever_the_modality(
    client: TestClient, encoder: Encoder
) -> None:
    red, blue = data_url(picture("red")), data_url(picture("blue"))
    body = {"queries": ["red", blue], "candidates": [red, "blue", blue]}
    answer = client.post("/v1/similarity", json=body).json()
    images = encoder.encode_images([drawing("red", "circle"), drawing("blue", "circle")])
    texts = encoder.encode_texts(["red", "blue"])
    queries, candidates = [texts[0], images[1]], [images[0], texts[1], images[1]]
    np.testing.assert_allclose(
        answer["cosines"], np.stack(queries) @ np.stack(candidates).T, atol=1e-5
    )
    assert answer["cosines"][1][2] == pytest.approx(1, abs=1e-5)
    assert answer["logit_scale"] == pytest.approx(encoder.info.logit_scale)
    assert answer["model"] == encoder.fingerprint


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"queries": ["a"]}, "body.candidates"),
        ({"queries": [], "candidates": ["a"]}, "body.queries"),
        ({"queries": ["a"] * 33, "candidates": ["a"] * 32}, "65 inputs"),
        ({"queries": ["a"], "candidates": ["x" * 2001]}, "2001 characters"),
        (
            {"queries": ["a"], "candidates": ["a", "data:image/png;base64,%"]},
            "candidates.1: the da",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(
    client: TestClient, body: dict[str, Any], named: str
) -> None:
    assert named in problem(client.post("/v1/similarity", json=body), 422)
