import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from serving.app import create_app
from serving.batching import MicroBatcher
from serving.errors import FingerprintError
from serving.settings import ServingSettings
from serving.stores import EmbeddedStore
from tests.serving.wire import problem
from tests.support import tiny_bundle
from vlm.errors import BundleError
from vlm.inference import Encoder


def test_a_poisoned_model_is_not_ready_and_a_healed_one_is(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = _encoder(client)

    def poisoned(images: Sequence[Image.Image]) -> np.ndarray:
        return np.full((len(images), 16), np.nan, np.float32)

    assert client.get("/readyz").json() == {"status": "ready"}
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode_images", poisoned)
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200


def test_a_damaged_collection_is_unavailable_and_its_server_not_ready(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "b")
    settings = ServingSettings(bundle=tmp_path / "b", index=tmp_path / "i")
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        client.post("/v1/items", json={"items": [{"text": "a red circle"}]})
        assert client.get("/readyz").status_code == 200
        for file in (tmp_path / "i" / "items.lance" / "data").iterdir():
            file.write_bytes(b"damaged")
        told = problem(client.post("/v1/search", json={"text": "a"}), 503)
        assert str(tmp_path) not in told
        assert client.get("/readyz").status_code == 503


def _encoder(client: TestClient) -> Encoder:
    app = client.app
    assert isinstance(app, FastAPI)
    encoder: Encoder = app.state.services.embedder()._encoder
    return encoder


@asynccontextmanager
async def application(config: ServingSettings) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    app = create_app(config)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
    ):
        yield app, client


def gate_of(
    batcher: MicroBatcher[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> tuple[threading.Event, threading.Event]:
    """Hold up what the batcher computes; what opens the gate, and what says that one is there."""
    gate, entered = threading.Event(), threading.Event()
    encode = batcher._encode

    def gated(token_ids: Sequence[np.ndarray], alone: bool) -> np.ndarray:
        entered.set()
        assert gate.wait(60)
        return np.asarray(encode(token_ids, alone))

    monkeypatch.setattr(batcher, "_encode", gated)
    return gate, entered


def test_a_stuck_model_is_not_ready_and_a_full_queue_answers_503(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        config = ServingSettings(
            bundle=bundle, index=tmp_path, max_waiting=1, max_batch=1, ready_seconds=0.05
        )
        async with application(config) as (app, client):
            batcher = app.state.services.embedder()._texts
            gate, entered = gate_of(batcher, monkeypatch)
            running = asyncio.create_task(client.post("/v1/embeddings", json={"input": "a"}))
            await asyncio.to_thread(entered.wait, 60)
            waiting = asyncio.create_task(client.post("/v1/embeddings", json={"input": "b"}))
            while not batcher.waiting:
                await asyncio.sleep(0.001)
            refused = await client.post("/v1/embeddings", json={"input": "c"})
            assert "too many requests" in problem(refused, 503)
            assert refused.headers["retry-after"] == "1"
            assert (await client.get("/readyz")).status_code == 503
            gate.set()
            assert (await running).status_code == (await waiting).status_code == 200
            assert (await client.get("/readyz")).status_code == 200

    asyncio.run(scenario())


def test_a_stuck_batch_of_one_stream_is_not_ready_though_another_computes(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "streams", 2)

    async def scenario() -> None:
        config = ServingSettings(bundle=bundle, index=tmp_path, ready_seconds=0.5)
        async with application(config) as (app, client):
            batcher = app.state.services.embedder()._texts
            encode = batcher._encode
            gate, entered = gate_of(batcher, monkeypatch)
            running = asyncio.create_task(client.post("/v1/embeddings", json={"input": "a"}))
            await asyncio.to_thread(entered.wait, 60)
            while batcher.computing_seconds < 0.5:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(batcher, "_encode", encode)
            other = await client.post("/v1/embeddings", json={"input": "b"})
            assert other.status_code == 200
            assert (await client.get("/readyz")).status_code == 503
            gate.set()
            assert (await running).status_code == 200
            assert (await client.get("/readyz")).status_code == 200

    asyncio.run(scenario())


def test_concurrent_requests_share_forward_passes_and_keep_their_own_answers(
    bundle: Path, tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with application(ServingSettings(bundle=bundle, index=tmp_path)) as (app, client):
            texts = [f"text number {n}" for n in range(40)]
            batcher = app.state.services.embedder()._texts
            sizes: list[int] = []
            encode = batcher._encode

            def counted(items: Sequence[np.ndarray], alone: bool) -> np.ndarray:
                sizes.append(len(items))
                return np.asarray(encode(items, alone))

            monkeypatch.setattr(batcher, "_encode", counted)
            answers = await asyncio.gather(
                *(client.post("/v1/embeddings", json={"input": text}) for text in texts)
            )
            rows = np.array([a.json()["data"][0]["embedding"] for a in answers], np.float32)
            assert np.abs(rows - encoder.encode_texts(texts)).max() < 1e-5
            assert sum(sizes) == 40
            assert len(sizes) < 40

    asyncio.run(scenario())


def test_an_index_of_another_model_stops_the_start(bundle: Path, tmp_path: Path) -> None:
    EmbeddedStore(tmp_path, fingerprint="f" * 64, dim=16)
    app = create_app(ServingSettings(bundle=bundle, index=tmp_path))
    with pytest.raises(FingerprintError, match="ffffffffffff"), TestClient(app):
        pass


def test_a_model_of_nan_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_bundle(tmp_path / "bundle")
    monkeypatch.setattr(
        Encoder, "encode_texts", lambda _, texts: np.full((len(texts), 16), np.nan, np.float32)
    )
    app = create_app(ServingSettings(bundle=tmp_path / "bundle", index=tmp_path / "index"))
    with pytest.raises(RuntimeError, match="not finite"), TestClient(app):
        pass


def test_nothing_is_read_before_the_start(tmp_path: Path) -> None:
    app = create_app(ServingSettings(bundle=tmp_path / "absent", index=tmp_path / "index"))
    assert not (tmp_path / "index").exists()
    with pytest.raises(BundleError, match="not a bundle"), TestClient(app):
        pass
