import json
import shutil
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from serving.app import create_app
from serving.settings import ServingSettings
from serving.stores import EmbeddedStore, read_collection_info
from tests.support import tiny_bundle, write_dataset
from vlm.cli.index import index
from vlm.cli.main import app
from vlm.errors import DataError
from vlm.inference import Encoder


def test_datasets_are_indexed_once_however_often_the_verb_is_given(
    bundle: Path, encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "shards", 24)
    index([tmp_path / "shards"], bundle=bundle, index=tmp_path / "index")
    assert "24 images indexed, 0 were there already" in capsys.readouterr().out
    index([tmp_path / "shards"], bundle=bundle, index=tmp_path / "index")
    assert "0 images indexed, 24 were there already" in capsys.readouterr().out
    store = EmbeddedStore(tmp_path / "index", fingerprint=encoder.fingerprint, dim=encoder.dim)
    assert store.count() == 24
    item = store.get("s00003")
    assert item is not None
    assert (item.text, item.metadata["style"]) == ("a yellow circle", "drawn")


def test_an_index_of_another_model_is_refused_in_words_for_a_person(
    bundle: Path, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "shards", 4)
    index([tmp_path / "shards"], bundle=bundle, index=tmp_path / "index")
    tiny_bundle(tmp_path / "other", seed=7)
    with pytest.raises(DataError, match="holds vectors of model"):
        index([tmp_path / "shards"], bundle=tmp_path / "other", index=tmp_path / "index")


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_a_collection_is_given_another_model_while_it_is_searched(
    bundle: Path, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "shards", 60)
    other = tmp_path / "models" / "other"
    fingerprint = tiny_bundle(other, seed=5).fingerprint
    root = tmp_path / "index"
    told = run("index", tmp_path / "shards", "--bundle", bundle, "--index", root,
               "--exact-below", 50)  # fmt: skip
    assert "recall@10 against exact search: text 1.000" in told or "text 0.9" in told
    assert json.loads((root / "recall.json").read_text())["items"] == 60
    settings = ServingSettings(
        bundle=bundle, index=root, models=tmp_path / "models", preload=["other"]
    )
    ask = {"text": "a yellow circle", "limit": 3}
    migrate = ("index", "migrate", "second", "--bundle", other, "--index", root)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        client.post("/v1/items", json={"items": [{"id": "note", "text": "yellow"}]})
        before = client.post("/v1/search", json=ask).json()["results"]
        told = run(*migrate, "--rate", 500)
        assert "61 items written, 0 kept, 0 removed" in told
        assert "'default' now stands for 'second'" in told
        described = client.get("/v1/collections/default").json()
        assert (described["name"], described["fingerprint"]) == ("second", fingerprint)
        after = client.post("/v1/search", json=ask).json()["results"]
        assert [hit["score"] for hit in after] != [hit["score"] for hit in before]
        assert client.get(after[0]["thumbnail"] or "/").status_code == 200
    info = read_collection_info(root)
    assert info is not None
    assert info.fingerprint != fingerprint  # the old one stays as it was


def test_a_migration_says_what_it_cannot_do(bundle: Path, tmp_path: Path) -> None:
    migrate = ("index", "migrate")
    options = ("--bundle", bundle, "--index", tmp_path / "index")
    with pytest.raises(DataError, match="no collection there"):
        run(*migrate, "second", *options)
    write_dataset(tmp_path / "shards", 4)
    index([tmp_path / "shards"], bundle=bundle, index=tmp_path / "index")
    for name in ("default", "../up", ".hidden"):
        with pytest.raises(DataError, match="cannot be the new collection's name"):
            run(*migrate, name, *options)
    shutil.rmtree(tmp_path / "shards")
    assert "4 items written" in run(*migrate, "second", *options)


def test_a_state_is_kept_under_a_name_and_brought_back(bundle: Path, tmp_path: Path) -> None:
    root = ("--index", tmp_path / "index")
    with pytest.raises(DataError, match="no collection there"):
        run("index", "snapshots", *root)
    write_dataset(tmp_path / "shards", 6)
    index([tmp_path / "shards"], bundle=bundle, index=tmp_path / "index")
    assert "none" in run("index", "snapshots", *root)
    assert "kept 'before'; there are: before" in run("index", "snapshot", "before", *root)
    info = read_collection_info(tmp_path / "index")
    assert info is not None
    store = EmbeddedStore(tmp_path / "index", fingerprint=info.fingerprint, dim=info.dim)
    store.delete(["s00000", "s00001"])
    assert "restored 'before': 6 items" in run("index", "restore", "before", *root)
    assert "there are: none" in run("index", "snapshot", "before", "--drop", *root)
    with pytest.raises(DataError, match="no snapshot 'before'; there are: none"):
        run("index", "restore", "before", *root)
