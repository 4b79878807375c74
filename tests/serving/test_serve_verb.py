"""`vlm serve`: which setting comes from where."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from serving.settings import ServingSettings
from tests.support import tiny_bundle
from vlm.cli.main import app


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ServingSettings]:
    """With which settings servers would have been started."""
    found: list[ServingSettings] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLM_SERVING_CONFIG", raising=False)
    monkeypatch.setattr("serving.__main__.run", found.append)
    for name in ("mine/bundle", "other/bundle", "runs/demo/bundle"):
        tiny_bundle(tmp_path / name)
    return found


def serve(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["serve", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def facts(settings: ServingSettings) -> tuple[str, str, str, int]:
    return str(settings.bundle), str(settings.index), settings.host, settings.port


def configure(monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    Path("serve.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("VLM_SERVING_CONFIG", "serve.yaml")


def test_what_is_not_given_leaves_the_settings_of_the_file(
    started: list[ServingSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(
        monkeypatch,
        bundle="mine/bundle",
        index="elsewhere",
        host="127.0.0.3",
        port=9000,
        max_batch=8,
    )
    assert "http://127.0.0.3:9000" in serve()
    serve("other/bundle", "max_batch=4", "--port", "9001", "--index", "i", "--host", "127.0.0.2")
    serve("other/bundle")
    assert [facts(settings) for settings in started] == [
        ("mine/bundle", "elsewhere", "127.0.0.3", 9000),
        ("other/bundle", "i", "127.0.0.2", 9001),
        ("other/bundle", "elsewhere", "127.0.0.3", 9000),
    ]
    assert [settings.max_batch for settings in started] == [8, 4, 8]


def test_the_collection_lies_beside_the_bundle_unless_it_is_named(
    started: list[ServingSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    serve("other/bundle")
    serve("other/bundle", "index=i", "port=9002")
    configure(monkeypatch, bundle="mine/bundle")
    serve()
    assert [facts(settings) for settings in started] == [
        ("runs/demo/bundle", "runs/demo/index", "127.0.0.1", 8000),
        ("other/bundle", "other/index", "127.0.0.1", 8000),
        ("other/bundle", "i", "127.0.0.1", 9002),
        ("mine/bundle", "mine/index", "127.0.0.1", 8000),
    ]
