"""A real server process under load: overload, hot swap and drain lose no accepted request."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving.conftest import Server, asking, running
from tests.serving.wire import data_url
from tests.support import drawing, encoded, tiny_bundle
from vlm.inference import Encoder

CAPACITY = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("first", "second")):
        tiny_bundle(folder / name, seed=number + 1)
    return folder


@pytest.fixture(scope="module")
def loaded(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A small server: few may wait, nothing is remembered."""
    index = tmp_path_factory.mktemp("loaded") / "index"
    settings = (f"max_waiting={CAPACITY}", "max_batch=4", "cache_bytes=0", "log_format=json")
    with running(
        f"bundle={models / 'first'}", f"index={index}", f"models={models}", *settings,
        "access_log=true",
    ) as found:  # fmt: skip
        yield found


def test_a_model_is_swapped_under_load_without_a_dropped_or_mixed_answer(
    loaded: Server, models: Path
) -> None:
    expected = {}
    for name in ("first", "second"):
        encoder = Encoder.load(models / name)
        expected[encoder.fingerprint] = encoder.encode_texts(["red"])[0]
    answers: Counter[str] = Counter()

    def ask(client: httpx.Client, number: int) -> None:
        answer = client.post("/v1/embeddings", json={"input": "red"})
        assert answer.status_code == 200, answer.text
        tree = answer.json()
        row = np.array(tree["data"][0]["embedding"])
        np.testing.assert_allclose(row, expected[tree["model"]], atol=1e-5)
        answers[tree["model"]] += 1

    with asking(loaded, CAPACITY - 2, ask):
        for bundle in ("second", "first", "second"):
            time.sleep(0.2)
            answer = loaded.client.post("/v1/models/tiny/load", json={"bundle": bundle})
            assert answer.status_code == 200, answer.text
        time.sleep(0.2)
    assert set(answers) == set(expected)
    assert min(answers.values()) > 3
    assert loaded.client.get("/readyz").status_code == 200


def test_ten_times_what_may_wait_is_refused_or_answered_and_leaves_a_sound_server(
    loaded: Server,
) -> None:
    statuses: Counter[int] = Counter()

    def ask(client: httpx.Client, number: int) -> None:
        answer = client.post("/v1/embeddings", json={"input": [f"{number} {n}" for n in range(4)]})
        statuses[answer.status_code] += 1
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
        else:
            assert len(answer.json()["data"]) == 4

    with asking(loaded, 10 * CAPACITY // 4, ask):
        time.sleep(1.5)
    assert set(statuses) == {200, 503}
    text = loaded.client.get("/metrics").text
    assert 'vlm_queue_items{tower="text"} 0.0' in text
    assert f'vlm_refusals_total{{status="503"}} {statuses[503]}.0' in text
    assert loaded.client.get("/readyz").status_code == 200


def test_clients_that_hang_up_leave_no_work_behind(loaded: Server) -> None:
    impatient = httpx.Client(base_url=loaded.url, timeout=0.02)
    images = [data_url(encoded(drawing("red", "circle", size=900)))] * 16
    for _ in range(5):
        with pytest.raises(httpx.TimeoutException):
            impatient.post("/v1/embeddings", json={"input": images})
    impatient.close()
    body = {"input": images[:1]}
    headers = {"x-request-timeout": "0.001"}
    late = loaded.client.post("/v1/embeddings", json=body, headers=headers)
    assert late.status_code == 504
    assert loaded.client.post("/v1/embeddings", json=body).status_code == 200
    assert 'vlm_queue_items{tower="image"} 0.0' in loaded.client.get("/metrics").text


def memory_bytes(server: Server) -> int:
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_damaged_images_of_every_kind_end_no_worker_and_keep_no_memory(loaded: Server) -> None:
    random = np.random.default_rng(0)
    image = drawing("red", "circle", size=300)
    whole = [encoded(image, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]

    def damaged(number: int) -> bytes:
        data = bytearray(whole[number % len(whole)])
        for place in random.integers(0, min(len(data), 4000), 1 + number % 5):
            data[place] = random.integers(256)
        return bytes(data[: random.integers(1, len(data))] if number % 3 == 0 else data)

    def rounds(count: int) -> None:
        for number in range(count):
            body = {"input": data_url(damaged(number))}
            answer = loaded.client.post("/v1/embeddings", json=body)
            assert answer.status_code in (200, 422), answer.text

    rounds(100)  # what libraries keep once is kept now
    before = memory_bytes(loaded)
    rounds(300)
    assert memory_bytes(loaded) - before < 40 * 2**20
    assert loaded.client.get("/readyz").status_code == 200


def test_sigterm_under_load_answers_everything_that_was_accepted(loaded: Server) -> None:
    """The last test of this process: it ends it."""
    answered: dict[str, int] = {}
    before = len(loaded.output)

    def ask(client: httpx.Client, number: int) -> None:
        try:
            answer = client.post("/v1/embeddings", json={"input": f"text {number}"})
        except httpx.TransportError:
            time.sleep(0.01)  # the door is closed, or an idle connection was: nothing was accepted
        else:
            answered[answer.headers["x-request-id"]] = answer.status_code

    with asking(loaded, 4, ask):
        while len(answered) <= 10:
            time.sleep(0.01)
        loaded.process.send_signal(signal.SIGTERM)
        loaded.process.wait(60)
    assert loaded.stop() in (0, -signal.SIGTERM)
    lines = [line for line in loaded.output[before:] if line.startswith("{")]
    log: list[dict[str, Any]] = [json.loads(line) for line in lines]
    accepted = {e["request_id"]: e["status"] for e in log if e["event"] == "request"}
    assert set(answered.values()) == {200}
    assert accepted == answered
    assert not [entry for entry in log if entry["event"] == "defect"]
