"""Servers and verbs on the cluster store, which share collections and keep nothing."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from serving.app import create_app
from serving.errors import StoreUnavailableError
from serving.settings import MilvusStoreConfig, ServingSettings
from serving.stores.milvus import MilvusStore
from tests.milvus_server import MilvusServer
from tests.support import write_dataset
from vlm.cli.main import app
from vlm.errors import DataError


@pytest.fixture
def config(milvus: MilvusServer, bundle: Path, tmp_path: Path) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"bundle: {bundle}\nindex: {tmp_path / 'none'}\n"
        f"store: {{type: milvus, uri: '{milvus.uri}', prefix: served_}}\n"
    )
    return path


@pytest.fixture
def replicas(milvus: MilvusServer, bundle: Path, tmp_path: Path) -> Iterator[list[TestClient]]:
    store = MilvusStoreConfig(uri=milvus.uri, prefix="served_")
    settings = ServingSettings(
        bundle=bundle, index=tmp_path / "none", store=store, exact_below=20, recall_target=0.8
    )
    with ExitStack() as stack:
        yield [
            stack.enter_context(TestClient(create_app(settings), base_url="http://127.0.0.1"))
            for _ in range(2)
        ]


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_replicas_and_verbs_share_what_the_cluster_has(
    bundle: Path,
    config: Path,
    replicas: list[TestClient],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = replicas
    write_dataset(tmp_path / "shards", 24)
    told = run("index", tmp_path / "shards", "--bundle", bundle, "--index", config)
    assert "24 images indexed, 0 were there already: served_items_default at http://127" in told
    note = {"items": [{"id": "note", "text": "a yellow circle", "metadata": {"n": 1}}]}
    assert ours.post("/v1/items", json=note).status_code == 201
    ask = {"text": "a yellow circle", "filter": {"n": {"gte": 1}}}
    assert [hit["id"] for hit in ours.post("/v1/search", json=ask).json()["results"]] == ["note"]
    assert ours.post("/v1/collections/default/measure").json()["measurement"]["items"] == 25
    for client in replicas:
        body = {"text": "a yellow circle", "words": "yellow circle", "limit": 3}
        found = client.post("/v1/search", json=body).json()["results"]
        assert len(found) == 3
        assert client.get("/v1/items", params={"limit": 1}).json()["total"] == 25
    thumbnail = theirs.get("/v1/items/s00003/thumbnail")
    assert thumbnail.headers["content-type"] == "image/webp"
    folder = tmp_path / "copy"
    move = ("index", "move", "--index", config, "--to", folder)
    assert "25 items written, 0 were there already, 0 removed" in run(*move)
    assert "0 items written, 25 were there already" in run(*move)
    assert run("search", "a yellow circle", "--bundle", bundle, "--index", folder) == run(
        "search", "a yellow circle", "--bundle", bundle, "--index", config
    )
    assert theirs.delete("/v1/items/note").status_code == 204
    with pytest.raises(DataError, match="has items that are not in the collection, 'note'"):
        run(*move)
    assert "1 removed" in run(*move, "--replace")
    with pytest.raises(DataError, match="is where it is already"):
        run("index", "move", "--index", folder, "--to", folder)
    with pytest.raises(DataError, match="only the embedded store keeps snapshots"):
        run("index", "snapshots", "--index", config)
    told = run("index", "move", "--index", folder, "--to", config, "--name", "birds")
    assert "24 items written" in told
    assert ours.put("/v1/collections/favourites/alias", json={"collection": "birds"}).json() == {
        "collections": ["default", "birds"], "aliases": {"favourites": "birds"},
    }  # fmt: skip
    assert ours.get("/v1/collections/favourites").json()["name"] == "birds"
    assert not (tmp_path / "none").exists()

    def unavailable(*arguments: object, **options: object) -> None:
        message = f"the store at {config} does not do it: it is being moved"
        raise StoreUnavailableError(message)

    monkeypatch.setattr(MilvusStore, "search", unavailable)
    refused = ours.post("/v1/search", json={"text": "red"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "what keeps the collections does not answer" in refused.json()["detail"]


def test_a_cluster_that_does_not_answer_is_told_without_a_secret(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("root:hunter2\n")
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"store: {{type: milvus, uri: 'http://127.0.0.1:1', token_file: {tmp_path / 'token'}, "
        "timeout_seconds: 0.5}"
    )
    with pytest.raises(DataError, match=r"the store at http://127\.0\.0\.1:1 does not") as caught:
        run("index", "snapshots", "--index", path)
    assert "hunter2" not in str(caught.value)
