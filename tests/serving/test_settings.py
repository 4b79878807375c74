import hashlib
from pathlib import Path

import pytest

from serving.settings import MilvusStoreConfig, ServingSettings, load_settings
from vlm.errors import ConfigError


def test_the_file_named_by_the_environment_is_read_and_overrides_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 9000\nmax_batch: 8\n", encoding="utf-8")
    monkeypatch.setenv("VLM_SERVING_CONFIG", str(file))
    settings = load_settings(["max_batch=4"])
    assert (settings.port, settings.max_batch) == (9000, 4)


def test_an_unknown_key_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_SERVING_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="did you mean 'max_batch'"):
        load_settings(["max_batsh=4"])


def test_keys_are_given_as_digests_only() -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    assert ServingSettings(api_key_sha256=[digest]).api_key_sha256 == [digest]
    with pytest.raises(ValueError, match="64 hex digits"):
        ServingSettings(api_key_sha256=["secret"])


@pytest.mark.parametrize(
    ("host", "allowed", "expected"),
    [
        ("127.0.0.1", [], {"localhost", "127.0.0.1", "::1"}),
        ("0.0.0.0", [], set()),
        ("127.0.0.1", ["pictures.example"], {"pictures.example"}),
    ],
)
def test_a_loopback_server_answers_to_loopback_names_unless_told_otherwise(
    host: str, allowed: list[str], expected: set[str]
) -> None:
    assert ServingSettings(host=host, allowed_hosts=allowed).host_names == expected


@pytest.mark.parametrize("file", sorted(Path("configs/serve").glob("*.yaml")), ids=str)
def test_every_config_that_is_shipped_is_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_SERVING_CONFIG", str(file))
    load_settings([])


def test_the_store_is_one_field_and_its_password_is_nowhere_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLM_SERVING_CONFIG", raising=False)
    assert load_settings([]).store.type == "embedded"
    store = load_settings(["store={type: milvus, uri: 'http://milvus:19530', shards: 2}"]).store
    assert isinstance(store, MilvusStoreConfig)
    assert (store.uri, store.shards, store.consistency) == ("http://milvus:19530", 2, "session")
    with pytest.raises(ConfigError, match="a password belongs in token_file") as caught:
        load_settings(["store={type: milvus, uri: 'http://root:hunter2@milvus:19530'}"])
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'token_file'"):
        load_settings(["store={type: milvus, uri: 'http://milvus', token_fil: x}"])
