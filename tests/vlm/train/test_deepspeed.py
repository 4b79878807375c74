"""DeepSpeed ZeRO gives the losses of plain PyTorch, on one rank and on two."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.distributed import run_ranks
from tests.support import write_dataset
from tests.vlm.train.test_train import configured, records, tree
from vlm.config import validate_config
from vlm.distributed import World
from vlm.train import TrainConfig

pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")


def train_in_group(world: World, settings: dict[str, Any], resume: bool) -> int:
    import logging
    import warnings

    warnings.simplefilter("ignore")  # DeepSpeed's own, which a user sees as well
    logging.disable(logging.WARNING)
    from vlm.train import train

    config = validate_config(TrainConfig, settings, source="test")
    return train(config, world=world, console=Console(quiet=True), resume=resume).step


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("size", "stage"), [(1, 0), (2, 2)])
def test_zero_trains_what_plain_pytorch_trains(tmp_path: Path, size: int, stage: int) -> None:
    write_dataset(tmp_path / "shards", 64)
    plain = configured(tmp_path, name="plain", ema_decay=None)
    run_ranks(1, train_in_group, plain.model_dump(mode="json"), False)
    engine = {"type": "deepspeed", "zero_stage": stage, "precision": "fp32"}
    settings = tree(tmp_path, name="zero", ema_decay=None, engine=engine, steps=12)
    assert run_ranks(size, train_in_group, settings, False) == [12] * size
    zero = validate_config(TrainConfig, settings, source="test")
    expected = [record["loss"] for record in records(plain)]
    assert [record["loss"] for record in records(zero)] == pytest.approx(expected, rel=1e-3)
    # Forget the end, and resume from step 10.
    last = zero.run_folder / "checkpoints" / "step-00000012"
    last.rename(last.with_name("forgotten"))
    assert run_ranks(size, train_in_group, settings, True) == [12] * size
    assert json.loads((last / "checkpoint.json").read_text())["step"] == 12
    assert [record["loss"] for record in records(zero)] == pytest.approx(expected, rel=1e-3)
