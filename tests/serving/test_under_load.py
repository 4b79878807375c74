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
from hypothesis import given, settings
from hypothesis import strategies as st

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
    limits = (f"max_waiting={CAPACITY}", "max_batch=4", "cache_bytes=0", "log_format=json")
    with running(
        f"bundle={models / 'first'}", f"index={index}", f"models={models}", *limits,
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


WHOLE = [
    encoded(drawing("red", "circle", size=300), kind)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An image file with other bytes here and there, cut off, lengthened, or not one at all."""
    data = bytearray(draw(st.sampled_from(WHOLE)))
    places = st.tuples(st.integers(0, min(len(data), 2000) - 1), st.integers(0, 255))
    for place, byte in draw(st.lists(places, max_size=8)):
        data[place] = byte
    cut = draw(st.one_of(st.none(), st.integers(0, len(data))))
    return bytes(data[:cut]) + draw(st.binary(max_size=20))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_no_bytes_for_an_image_end_a_worker_or_stay_in_its_memory(loaded: Server) -> None:
    @given(file=st.one_of(damaged(), st.binary(min_size=1, max_size=400)))
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    def ask(file: bytes) -> None:
        answer = loaded.client.post("/v1/embeddings", json={"input": data_url(file)})
        assert answer.status_code in (200, 422), answer.text

    ask()  # what libraries keep once is kept now
    before = memory_bytes(loaded)
    ask()
    assert memory_bytes(loaded) - before < 20 * 2**20
    assert loaded.process.poll() is None
    assert loaded.client.get("/readyz").status_code == 200


def ready_events(server: Server) -> list[dict[str, Any]]:
    log = [json.loads(line) for line in list(server.output) if line.startswith("{")]
    return [entry for entry in log if entry["event"] == "ready"]


def wait_for_processes(server: Server, count: int) -> list[dict[str, Any]]:
    end = time.monotonic() + 240
    while len(found := ready_events(server)) < count:
        assert time.monotonic() < end, server.output
        time.sleep(0.05)
    return found


def test_a_killed_worker_loses_no_acknowledged_item_and_its_device_is_served_again(
    models: Path, tmp_path: Path
) -> None:
    acknowledged: list[str] = []

    def ask(client: httpx.Client, number: int) -> None:
        name = f"{number}-{len(acknowledged)}"
        try:
            answer = client.post("/v1/items", json={"items": [{"id": name, "text": name}]})
        except httpx.TransportError:
            return  # its worker was killed before it had answered: the client knows nothing
        assert answer.status_code == 201, answer.text
        acknowledged.append(name)

    with running(
        f"bundle={models / 'first'}", f"index={tmp_path / 'index'}", "devices=[cpu, 'cpu:0']",
        "log_format=json",
    ) as server:  # fmt: skip
        first = wait_for_processes(server, 2)
        assert sorted(entry["device"] for entry in first) == ["cpu", "cpu:0"]
        with asking(server, 3, ask):
            while len(acknowledged) < 5:
                time.sleep(0.01)
            os.kill(first[1]["pid"], signal.SIGKILL)
            third = wait_for_processes(server, 3)[2]
            before = len(acknowledged)
            while len(acknowledged) < before + 5:
                time.sleep(0.01)
        assert third["device"] == first[1]["device"]
        for name in acknowledged:
            assert server.client.get(f"/v1/items/{name}").status_code == 200, name
        assert server.stop() in (0, -signal.SIGTERM)


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
