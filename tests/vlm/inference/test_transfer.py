"""Bundles that go through an object store arrive whole and as they were, or not at all."""

from pathlib import Path

import boto3
import pytest

from tests.object_stores import s3_environment, s3_server
from tests.support import tiny_bundle
from vlm.errors import BundleError, StoreError
from vlm.inference import fetch_bundle, load_bundle, push_bundle


def test_a_bundle_returns_from_an_s3_store_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tiny_bundle(tmp_path / "bundle")
    with s3_server() as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="models")
        push_bundle(tmp_path / "bundle", "s3://models/bundles/tiny")
        found = fetch_bundle(
            "s3://models/bundles/tiny", tmp_path / "here", fingerprint=info.fingerprint
        )
        assert found == info
        assert load_bundle(tmp_path / "here").info == info
        with pytest.raises(BundleError, match=r"s3://models/nothing: no intact bundle"):
            fetch_bundle("s3://models/nothing", tmp_path / "nothing")
        with pytest.raises(StoreError, match=r"absent-bucket.*credentials"):
            push_bundle(tmp_path / "bundle", "s3://absent-bucket/tiny")
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "here"}


def test_a_bundle_that_is_there_is_verified_and_not_fetched_again(tmp_path: Path) -> None:
    info = tiny_bundle(tmp_path / "bundle")
    target = str(tmp_path / "store")
    push_bundle(tmp_path / "bundle", target)
    (tmp_path / "here").mkdir()  # as Kubernetes makes an empty volume
    fetch_bundle(target, tmp_path / "here")
    again = fetch_bundle("s3://nobody/asks", tmp_path / "here", fingerprint=info.fingerprint)
    assert again == info
    with (tmp_path / "here" / "model.safetensors").open("ab") as file:
        file.write(b"!")
    with pytest.raises(BundleError, match="altered since export"):
        fetch_bundle(target, tmp_path / "here")


def test_wrong_bytes_leave_nothing_behind(tmp_path: Path) -> None:
    info = tiny_bundle(tmp_path / "bundle")
    store = tmp_path / "store"
    push_bundle(tmp_path / "bundle", str(store))
    with pytest.raises(BundleError, match=f"is bundle {info.fingerprint}, and 00ff was asked for"):
        fetch_bundle(str(store), tmp_path / "here", fingerprint="00ff")
    weights = bytearray((store / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (store / "model.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match="altered since export"):
        fetch_bundle(str(store), tmp_path / "here")
    (store / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"model.safetensors is missing; push it again"):
        fetch_bundle(str(store), tmp_path / "here")
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "store"}


def test_neither_another_bundle_nor_other_files_are_replaced(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        tiny_bundle(tmp_path / name, seed=seed)
    push_bundle(tmp_path / "a", str(tmp_path / "store"))
    push_bundle(tmp_path / "a", str(tmp_path / "store"))
    with pytest.raises(BundleError, match="push .* under another name"):
        push_bundle(tmp_path / "b", str(tmp_path / "store"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear reader")
    with pytest.raises(BundleError, match="holds other files"):
        fetch_bundle(str(tmp_path / "store"), tmp_path / "full")
    with pytest.raises(BundleError, match="no store can be opened"):
        fetch_bundle("nonsense://x/y", tmp_path / "here")
