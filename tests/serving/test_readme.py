from pathlib import Path

from fastapi.testclient import TestClient

from serving.settings import ServingSettings

README = Path("serving/README.md").read_text(encoding="utf-8")


def test_every_route_is_shown_with_a_curl(client: TestClient) -> None:
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method in methods:
            shown_as = [
                f"curl {option}localhost:8000{path.replace('{item_id}', 'my-apple')}".replace(
                    "{name}", name
                )
                for name in ("demo", "default", "drawings", "fruit")
                for option in ("", f"-X {method.upper()} ")
            ]
            assert any(text in README for text in shown_as), (method, path)


def test_every_setting_is_in_the_table() -> None:
    for name in ServingSettings.model_fields:
        assert f"`{name}`" in README
