import os
import threading
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.caching import FileCache, RowCache
from serving.metrics import Metrics
from serving.settings import ServingSettings
from tests.serving.wire import data_url, picture
from vlm.inference import Encoder

ROW = np.arange(16, dtype=np.float32)


def test_rows_come_back_for_their_model_and_kind_alone() -> None:
    cache = RowCache(10_000, Metrics())
    cache.put("m", "text", "red", ROW)
    found = cache.get("m", "text", "red")
    assert found is not None
    assert found.tolist() == ROW.tolist()
    assert cache.get("n", "text", "red") is None
    assert cache.get("m", "image", "red") is None
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_what_was_used_least_is_forgotten_first_and_bytes_are_bounded() -> None:
    metrics = Metrics()
    cache = RowCache(2000, metrics)
    for number in range(100):
        cache.put("m", "text", f"text {number}", ROW)
        cache.get("m", "text", "text 0")
    assert cache.get("m", "text", "text 0") is not None
    assert cache.get("m", "text", "text 99") is not None
    assert cache.get("m", "text", "text 50") is None
    bytes_told = metrics.registry.get_sample_value("vlm_cache_bytes")
    assert bytes_told is not None
    assert 1000 < bytes_told <= 2000
    cache.put("m", "text", "x" * 2000, ROW)  # larger than all of it
    assert cache.get("m", "text", "text 99") is not None


def test_a_row_does_not_keep_its_batch_alive_and_is_counted_once() -> None:
    metrics = Metrics()
    cache = RowCache(2000, metrics)
    batch = np.zeros((1000, 16), np.float32)
    for _ in range(10):
        cache.put("m", "text", "red", batch[0])
    found = cache.get("m", "text", "red")
    assert found is not None
    assert found.base is None
    assert metrics.registry.get_sample_value("vlm_cache_bytes") == 64 + 12 + 300


def test_threads_share_it() -> None:
    cache = RowCache(3000, Metrics())

    def use(first: int) -> None:
        for number in range(first, first + 300):
            cache.put("m", "text", str(number), ROW)
            cache.get("m", "text", str(number - 1))

    threads = [threading.Thread(target=use, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < cache._bytes <= 3000
    assert cache._bytes == sum(row.nbytes + 4 * len(k[2]) + 300 for k, row in cache._rows.items())


def test_answers_are_the_same_with_a_cache_and_without(
    bundle: Path, encoder: Encoder, tmp_path: Path
) -> None:
    inputs = ["red", data_url(picture()), "blue", data_url(picture("blue")), "red"]
    expected = encoder.encode_texts(["red", "blue"])
    for size in (0, 10_000_000):
        settings = ServingSettings(bundle=bundle, index=tmp_path / str(size), cache_bytes=size)
        with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
            for _ in range(2):
                data = client.post("/v1/embeddings", json={"input": inputs}).json()["data"]
                rows = np.array([entry["embedding"] for entry in data])
                np.testing.assert_allclose(rows[[0, 2]], expected, atol=1e-5)
                np.testing.assert_allclose(rows[4], rows[0], atol=0)
            thumbnail = {"id": "x", "image": data_url(picture())}
            assert client.post("/v1/items", json={"items": [thumbnail]}).status_code == 201
            assert client.get("/v1/items/x/thumbnail").status_code == 200
            hits = 'vlm_cache_lookups_total{kind="text",result="hit"} 2.0'
            assert (hits in client.get("/metrics").text) == (size > 0)


def test_what_was_made_of_files_is_bounded_by_their_bytes(tmp_path: Path) -> None:
    def file(name: str, size: int) -> os.stat_result:
        (tmp_path / name).write_bytes(b"x" * size)
        return (tmp_path / name).stat()

    cache: FileCache[str] = FileCache(100)
    files = {name: file(name, 40) for name in "abc"}
    for name in "ab":
        cache.put(name, files[name], name)
    assert cache.get("a", files["a"]) == "a"
    cache.put("c", files["c"], "c")
    assert [cache.get(name, files[name]) for name in "abc"] == ["a", None, "c"]
    changed = file("c", 41)
    assert cache.get("c", changed) is None
    cache.put("c", changed, "changed")
    cache.put("b", files["b"], "b")
    assert [cache.get(name, files[name]) for name in "ab"] == [None, "b"]
    assert cache.get("c", changed) == "changed"
    large = file("d", 1000)
    cache.put("d", large, "d")  # alone, or each request would read it again
    assert cache.get("d", large) == "d"
    assert cache.get("c", changed) is None
    cache.put("a", files["a"], "a")
    assert cache.get("d", large) is None
    cache.forget("a")
    cache.forget("a")
    assert cache.get("a", files["a"]) is None
