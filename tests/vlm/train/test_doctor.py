"""What the doctor says about runs that are well, and about those that are not."""

import json
import re
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from tests.support import write_dataset
from tests.vlm.train.test_telemetry import config_tree, configured
from vlm.cli.main import app
from vlm.distributed import World
from vlm.train import TrainConfig
from vlm.train.doctor import Finding, examine
from vlm.train.doctor_memory import forecast_memory, peak_bytes, probe_steps
from vlm.train.engine import TorchEngine
from vlm.train.setup import build_parts
from vlm.train.step import train_step


def findings(config: TrainConfig, tmp_path: Path, **given: Any) -> dict[str, Finding]:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    found = examine(config, world=World(), scratch=scratch, **{"world_size": 1, **given})
    return {finding.check: finding for finding in found}


def test_a_sound_run_is_described_and_nothing_of_it_is_left_behind(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 48)
    config = configured(
        tmp_path, optim={"type": "adamw"}, global_batch=24, micro_batch=6, ema_decay=0.9
    )
    found = findings(config, tmp_path, world_size=2, price_per_hour=3600.0)
    of_this_machine = ("loader", "host")
    others = [finding for finding in found.values() if finding.check not in of_this_machine]
    assert {finding.verdict for finding in others} == {"ok"}
    assert found["data"].text == (
        "48 samples; 24 a step = 2 ranks x 2 micro-batches x 6; 6 steps, 3 epochs"
    )
    assert "optim.type=lion optim.lr=0.0001" in found["optimizer"].text
    assert {"loss clip", "loss alignment"} <= set(found)
    cost = found["time"].figures
    assert cost["cost"] == pytest.approx(cost["hours"] * 2 * 3600)
    assert re.match(r"\d+ s at .* on 2 devices like this one, if", found["time"].text)
    assert cost["hours"] * 3600 * cost["samples_per_second"] == pytest.approx(6 * 24)
    assert found["disk"].figures["needed"] == 3 * found["disk"].figures["checkpoint"]
    assert not (tmp_path / "runs").exists()


def test_an_output_that_is_a_file_is_a_problem(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 24)
    (tmp_path / "file").write_text("mine")
    found = findings(configured(tmp_path, output=str(tmp_path / "file")), tmp_path)
    assert found["disk"].verdict == "problem"
    assert "no folder that can be written" in found["disk"].text


def test_what_is_wrong_is_said_with_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "shards", 24)
    found = findings(configured(tmp_path), tmp_path, world_size=5)
    assert found["batch"].advice == "global_batch=10 or 15"
    found = findings(configured(tmp_path, micro_batch=9), tmp_path)
    assert found["batch"].advice == "micro_batch=3"
    missing = findings(configured(tmp_path, data={"shards": str(tmp_path / "none")}), tmp_path)
    assert missing["data"].verdict == "problem"
    assert "none" in missing["data"].text

    usage = namedtuple("usage", ("free",))
    memory = namedtuple("memory", ("available",))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(0))
    config = configured(tmp_path, global_batch=32, optim={"type": "lion", "lr": 1e-2})
    found = findings(config, tmp_path)
    assert found["optimizer"].verdict == "warning"
    assert found["data"].verdict == "warning"  # a step is larger than the data
    assert found["disk"].verdict == "problem"
    assert "keep_checkpoints=1" in found["disk"].advice
    assert found["memory"].verdict != "ok"
    assert "micro_batch=" in found["memory"].advice or "fsdp" in found["memory"].advice


def test_a_vocabulary_that_is_too_small_is_found(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 24)
    model = config_tree(tmp_path)["model"]
    small = {**model, "text": {**model["text"], "vocab_size": 100}}
    found = findings(configured(tmp_path, model=small), tmp_path)
    assert found["configuration"].verdict == "problem"
    assert "(model.text.vocab_size=49408)" in found["configuration"].text
    assert "loss clip" not in found  # nothing can be computed


def test_the_peak_of_a_larger_step_is_within_15_percent_of_the_forecast(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 64)
    model = {
        "dim": 64,
        "image": {"type": "vit", "width": 64, "layers": 2, "head_width": 32, "patch_size": 4},
        "text": {"type": "transformer", "width": 32, "layers": 1, "heads": 2},
    }
    config = configured(
        tmp_path, model=model, image={"size": 32}, global_batch=64, optim={"type": "adamw"}
    )
    world = World()
    parts = build_parts(config, world)
    assert isinstance(parts.engine, TorchEngine)
    batch = next(parts.stream.batches(0, 1))
    probe = probe_steps(
        config, parts.engine, parts.objective, batch, world, micro_batch=64, clock=time.perf_counter
    )
    assert probe.batches == (8, 16)
    forecast = forecast_memory(
        config, probe, world_size=1, micro_batch=64, loader_bytes=5, process_bytes=7
    )
    measured = peak_bytes(
        lambda: train_step(
            config, parts.engine, parts.objective, batch,
            micro_batch=64, step=0, progress=0.0, world=world,
        ),
        world.device,
    )  # fmt: skip
    held = forecast.parameters + forecast.optimizer
    assert forecast.tensors == pytest.approx(held + measured, rel=0.15)
    assert forecast.host == pytest.approx(1.1 * forecast.tensors + 12, abs=1)
    assert forecast.optimizer >= 2 * probe.gradient_bytes

    def spread(engine: dict[str, Any]) -> tuple[int, int]:
        own = configured(tmp_path, engine=engine, optim={"type": "adamw"}, global_batch=64)
        found = forecast_memory(
            own, probe, world_size=4, micro_batch=16, loader_bytes=0, process_bytes=0
        )
        return found.gradients, found.optimizer

    assert spread({"type": "torch"}) == (2 * probe.gradient_bytes, probe.optimizer_bytes)
    assert spread({"type": "deepspeed", "zero_stage": 1}) == (
        probe.gradient_bytes, round(probe.optimizer_bytes / 4),
    )  # fmt: skip
    assert spread({"type": "deepspeed", "zero_stage": 2})[0] == round(probe.gradient_bytes / 4)


def test_the_command_prints_verdicts_or_json_and_fails_on_a_problem(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 24)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config_tree(tmp_path)))
    runner = CliRunner()
    done = runner.invoke(app, ["doctor", str(path), "--world-size", "5"])
    assert done.exit_code == 1
    assert "problem  batch: global_batch=12 does not divide over 5 ranks" in done.output
    assert "→ global_batch=10 or 15" in done.output
    done = runner.invoke(app, ["doctor", str(path), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output[done.output.index("[\n") :])
    assert {"data", "tokenizer", "loss clip", "memory", "disk", "loader", "time"} <= {
        finding["check"] for finding in found
    }
