"""Bundles are served from a prefix of an object store: fetched once, verified, kept."""

import time
from pathlib import Path
from typing import Any

import boto3
import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.services.shelf import without_places
from serving.settings import ServingSettings, load_settings
from tests.object_stores import s3_environment, s3_server
from tests.serving.wire import problem
from tests.support import tiny_bundle
from vlm.errors import StoreError
from vlm.inference import push_bundle

URL = "s3://models/some/prefix"


def test_a_server_takes_its_models_from_an_s3_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("first", "second", "altered")
    known = {n: tiny_bundle(tmp_path / n, seed=i) for i, n in enumerate(names)}
    settings = ServingSettings(
        bundle=f"{URL}/first", models=URL, bundle_cache=tmp_path / "cache", index=tmp_path / "index"
    )
    with s3_server() as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        s3 = boto3.client("s3", endpoint_url=endpoint)
        s3.create_bucket(Bucket="models")
        for name in names:
            push_bundle(tmp_path / name, f"{URL}/{name}")
        s3.put_object(Bucket="models", Key="some/prefix/empty/notes.txt", Body=b"no bundle")
        tokenizer = "some/prefix/altered/tokenizer_config.vlm.json"
        s3.put_object(Bucket="models", Key=tokenizer, Body=b"{}")
        with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
            listed = client.get("/v1/models").json()
            assert listed["available"] == ["altered", "first", "second"]
            assert listed["data"][0]["fingerprint"] == known["first"].fingerprint
            loaded = client.post("/v1/models/second/load").json()
            assert loaded["fingerprint"] == known["second"].fingerprint
            said = problem(client.post("/v1/models/x/load", json={"bundle": "altered"}), 422)
            assert "altered" in said
            assert "s3://" not in said
            assert str(tmp_path) not in said
            problem(client.post("/v1/models/empty/load"), 404)
    kept = {path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")}
    assert {known[n].fingerprint[:16] for n in ("first", "second")} <= kept


def test_a_silent_store_leaves_what_is_known_and_served(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [["photos"]]

    def stored(url: str) -> list[str]:
        if answers:
            found: list[str] = answers.pop()
            return found
        message = f"{url}: the store failed"
        raise StoreError(message)

    monkeypatch.setattr("serving.services.shelf.stored_bundles", stored)
    settings = ServingSettings(bundle=bundle, models=URL, index=tmp_path)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        assert client.get("/v1/models").json()["available"] == ["photos"]
        later = time.monotonic() + 60
        monkeypatch.setattr("serving.services.shelf.time.monotonic", lambda: later)
        assert client.get("/v1/models").json()["available"] == ["photos"]
        answer = client.post("/v1/models/other/load")
        assert "does not answer" in problem(answer, 503)
        assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/srv/a/b: incomplete, cannot read /srv/a/b/w.safetensors (No", "b: incomplete, cannot"),
        ("s3://host:9000/x/b: not a bundle", "b: not a bundle"),
        ("shelf of mine/b/bundle.json:\n  nmae: no such key", "b/bundle.json:\n  nmae: no"),
        ("~/x/b: see '../y/b' (/z/b)", "b: see 'b' (b)"),
        ("12.0 images/s, 3 and/or 4; it is n/a", "12.0 images/s, 3 and/or 4; it is n/a"),
    ],
)
def test_clients_see_no_place_of_a_bundle(text: str, left: str) -> None:
    settings = ServingSettings(models=Path("shelf of mine"))
    found = without_places(text, settings)
    assert found.startswith(left)
    assert "/srv" not in found


def test_a_place_of_bundles_is_a_folder_or_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_SERVING_CONFIG", raising=False)
    settings = load_settings([f"bundle={URL}/first", "models=some/folder"])
    assert (settings.bundle, settings.models) == (f"{URL}/first", Path("some/folder"))
    again = ServingSettings.model_validate_json(settings.model_dump_json())
    assert (again.bundle, again.models) == (settings.bundle, settings.models)
