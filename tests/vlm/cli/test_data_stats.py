import json
from pathlib import Path

from typer.testing import CliRunner

from tests.support import write_dataset
from vlm.cli.main import app


def test_the_verb_prints_a_table_and_leaves_a_page_beside_the_shards(tmp_path: Path) -> None:
    write_dataset(tmp_path, 20)
    result = CliRunner().invoke(app, ["data", "stats", str(tmp_path), "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert "samples read" in result.output
    tree = json.loads((tmp_path / "stats" / "stats.json").read_text())
    assert tree["num_samples"] == 20
    page = (tmp_path / "stats" / "stats.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.endswith("</html>\n")
    again = CliRunner().invoke(app, ["data", "stats", str(tmp_path), "--limit", "5"])
    assert "5 of 20" in again.output
