from pathlib import Path

import pytest

from tests.support import write_dataset
from tests.vlm.train.runs import configured, records, run
from vlm.distributed import World
from vlm.errors import CheckpointError
from vlm.train import alone
from vlm.train.alone import alone_in


def test_a_run_is_trained_by_one_process_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two wrote into one folder, and nobody could tell whose weights its checkpoints held."""
    monkeypatch.setattr(alone, "_PATIENCE_SECONDS", 0.2)
    write_dataset(tmp_path / "shards", 24)
    config = configured(tmp_path, steps=2)
    with (
        alone_in(config.run_folder, World()),
        pytest.raises(CheckpointError, match=r"another process trains this run \(process \d+ on"),
    ):
        run(config)
    assert not (config.run_folder / "metrics.jsonl").exists()
    run(config)
    assert records(config)[-1]["step"] == 2
