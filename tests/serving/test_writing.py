from pathlib import Path

from typer.testing import CliRunner

from tests.serving.conftest import running
from tests.serving.writing import searched_while_written, serving_two_models
from vlm.cli.main import app


def test_no_search_fails_while_items_are_written_indexed_and_migrated(tmp_path: Path) -> None:
    migrate = ["index", "migrate", "second", "--bundle", str(tmp_path / "models" / "other"),
               "--index", str(tmp_path / "index"), "--rate", "1000"]  # fmt: skip
    with running(*serving_two_models(tmp_path, exact_below=100)) as server:
        watched = searched_while_written(
            server, 400, lambda: CliRunner().invoke(app, migrate, catch_exceptions=False)
        )
    assert len(watched.seconds) > 20
