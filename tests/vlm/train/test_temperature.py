"""A temperature that follows a schedule instead of being learnt."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support import TINY_MODEL, write_dataset
from vlm.config import validate_config
from vlm.distributed import World
from vlm.errors import ConfigError
from vlm.train import TrainConfig, train
from vlm.train.export import load_run


def configured(tmp_path: Path, **changes: Any) -> TrainConfig:
    tree = {
        "name": "run", "output": str(tmp_path / "runs"), "steps": 4, "global_batch": 8,
        "image": {"size": 16}, "tokenizer": {"context_length": 8},
        "data": {"shards": str(tmp_path / "shards")},
        "model": TINY_MODEL, "loss": [{"type": "clip"}],
        "temperature": {"at": [0, 1], "value": [0.02, 0.1]},
        "optim": {"type": "lion", "lr": 1e-3, "scalar_lr": 1.0},
        "engine": {"type": "torch", "precision": "fp32"}, "log_every": 1, **changes,
    }  # fmt: skip
    return validate_config(TrainConfig, tree, source="test")


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_every_step_has_the_temperature_of_its_schedule(
    tmp_path: Path, micro_batch: int | None
) -> None:
    write_dataset(tmp_path / "shards", 16)
    config = configured(tmp_path, micro_batch=micro_batch)
    train(config, world=World(), console=Console(quiet=True), resume=False)
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    found = [1 / json.loads(line)["logit_scale"] for line in lines]
    assert found == pytest.approx([0.02, 0.04, 0.06, 0.08], rel=1e-5)
    model = load_run(config.run_folder).model
    assert float(model.log_logit_scale.detach()) == pytest.approx(math.log(1 / 0.08))


def test_a_temperature_out_of_range_or_with_an_owner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must lie in \[0\.01, 1\], found \[0\.001\]"):
        configured(tmp_path, temperature={"at": [0], "value": [0.001]})
    with pytest.raises(ConfigError, match="fastclip_v3 has a temperature of its own"):
        configured(tmp_path, loss=[{"type": "fastclip_v3"}])
    with pytest.raises(ConfigError, match="ZeRO 3 lets no parameter be set"):
        configured(tmp_path, engine={"type": "deepspeed", "zero_stage": 3})
