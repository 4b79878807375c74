"""What a run tells about itself: seconds, figures, page, and other places that take them."""

import io
import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

from tests.support import TINY_MODEL, unit_rows, write_dataset
from vlm.cli.main import app
from vlm.config import validate_config
from vlm.distributed import World
from vlm.errors import ConfigError, VlmError
from vlm.train import TrainConfig, train
from vlm.train.curves import chart
from vlm.train.flops import flops_per_sample, peak_flops
from vlm.train.ledger import PLACES, Ledger
from vlm.train.records import find_runs, flat, read_run
from vlm.train.watch import watch_geometry, watch_gradients
from vlm.types import DualEncoderOutput


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_second_is_in_one_place_and_they_sum_to_wall_time() -> None:
    clock, waited = Clock(), Clock()
    ledger = Ledger(communicated=waited, clock=clock)
    for place, seconds in (("data", 2.0), ("compute", 3.0), ("checkpoint", 4.0), ("data", 1.0)):
        clock.now += 1.0  # in the place before
        ledger.enter(place)
        clock.now += seconds - 1.0
    waited.now += 5.0  # in a checkpoint: not taken out of anything
    taken = ledger.take()
    assert taken == {
        **dict.fromkeys(PLACES, 0.0),
        "startup": 1.0, "data": 2.0, "compute": 3.0, "checkpoint": 4.0,
    }  # fmt: skip
    assert sum(taken.values()) == clock.now
    ledger.enter("compute")
    clock.now += 3.0
    waited.now += 1.0
    assert ledger.take() == {**dict.fromkeys(PLACES, 0.0), "compute": 2.0, "communication": 1.0}


def config_tree(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "output": str(tmp_path / "runs"),
        "steps": 6,
        "global_batch": 12,
        "image": {"size": 16},
        "tokenizer": {"context_length": 8},
        "data": {"shards": str(tmp_path / "shards")},
        "model": TINY_MODEL,
        "loss": [{"type": "clip"}, {"type": "alignment", "weight": 0.1}],
        "optim": {"type": "lion", "lr": 2e-3, "weight_decay": 0.1},
        "engine": {"type": "torch", "precision": "fp32"},
        "log_every": 2,
        "checkpoint_every": 4,
        **changes,
    }


def configured(tmp_path: Path, **changes: Any) -> TrainConfig:
    return validate_config(TrainConfig, config_tree(tmp_path, **changes), source="test")


class FakeWandb(types.ModuleType):
    """Takes what the package would."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged: list[dict[str, float]] = []
        self.started: dict[str, Any] = {}
        self.finished = False

    def init(self, **settings: Any) -> "FakeWandb":
        self.started = settings
        return self

    def log(self, record: dict[str, float], step: int) -> None:
        assert record["step"] == step
        self.logged.append(record)

    def finish(self) -> None:
        self.finished = True


def test_a_run_tells_everything_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "shards", 24)
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    telemetry = {
        "tensorboard": True, "wandb": {"project": "p", "mode": "offline"}, "peak_tflops": 1e-3,
        "page_every_seconds": 0, "profile": {"from_step": 2, "steps": 1},
    }  # fmt: skip
    config = configured(tmp_path, telemetry=telemetry)
    console = Console(record=True, width=200, file=io.StringIO())
    train(config, world=World(), console=console, resume=False)
    said = console.export_text()
    assert "note: optim.lr=0.002 with optim.weight_decay=0.1 looks like AdamW's" in said

    run = read_run(config.run_folder)
    assert [record["step"] for record in run.records] == [2, 4, 6]
    last = run.last
    for name in ("gradient_norm/image", "gradient_norm/text", "effective_rank/image",
                 "uniformity_above_floor/text", "goodput", "mfu", "quarantined"):  # fmt: skip
        assert math.isfinite(last[name]), name
    whole = last["gradient_norm/image"] ** 2 + last["gradient_norm/text"] ** 2
    assert math.sqrt(whole) <= last["gradient_norm"] * 1.001
    assert last["mfu"] == pytest.approx(
        last["samples_per_second"] * flops_per_sample(config) / 1e9, rel=0.01
    )
    seconds = run.seconds()
    assert seconds["checkpoint"] > 0  # of the last one, after the last record, too
    assert seconds["redone"] == seconds["evaluation"] == 0
    assert 0 < (run.goodput() or 0) < 1

    assert wandb.finished
    assert wandb.started["mode"] == "offline"
    assert [record["loss"] for record in wandb.logged] == [r["loss"] for r in run.records]
    assert list((config.run_folder / "tensorboard").glob("events*"))
    trace = json.loads((config.run_folder / "trace-rank0.json").read_text())
    assert any("backward" in event.get("name", "") for event in trace["traceEvents"])
    page = (config.run_folder / "report.html").read_text()
    assert "finished: step 6 of 6" in page
    assert "http-equiv" not in page  # a finished run does not reload
    assert not re.search(r'(?:src|href)="', page)  # nothing is loaded from anywhere


def test_what_is_asked_for_and_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "shards", 24)
    for name, section in (
        ("wandb", {"wandb": {"project": "p"}}),
        ("torch.utils.tensorboard", {"tensorboard": True}),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match="pip install"):
            train(
                configured(tmp_path, telemetry=section, name=name),
                world=World(),
                console=Console(quiet=True),
                resume=False,
            )


def write_run(folder: Path, name: str, **changes: Any) -> None:
    (folder / name).mkdir(parents=True)
    config = {"name": name, "loss": [{"type": "clip"}], **changes}
    (folder / name / "config.yaml").write_text(yaml.safe_dump(config))


def write_lines(path: Path, lines: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_steps_done_again_after_a_resume_count_as_redone(tmp_path: Path) -> None:
    write_run(tmp_path, "a")
    idle = dict.fromkeys(PLACES, 0.0)
    write_lines(tmp_path / "a" / "seconds.jsonl", [
        {**idle, "step": 10, "compute": 4.0, "data": 1.0},
        {**idle, "step": 20, "compute": 4.0},
        {**idle, "step": 20, "stalls": 1.0},                     # the end of a start
        {**idle, "step": 20, "compute": 4.0, "startup": 2.0},    # resumed from step 10
        {**idle, "step": 30, "compute": 4.0},
    ])  # fmt: skip
    run = read_run(tmp_path / "a")
    assert run.seconds() == {**idle, "compute": 12.0, "data": 1.0, "stalls": 1.0, "redone": 6.0}
    assert run.goodput() == pytest.approx(12 / 20)


def record(step: int, loss: float) -> dict[str, float]:
    return {
        "step": step, "samples": step * 10, "loss": loss, "samples_per_second": 50.0,
        "modality_gap": 0.5,
    }  # fmt: skip


def test_runs_are_listed_newest_first_and_compared_by_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path, "early")
    write_run(tmp_path, "a", optim={"lr": 1.0})
    write_run(tmp_path, "b", optim={"lr": 2.0})
    write_lines(tmp_path / "a" / "metrics.jsonl", [record(1, 4.0), record(2, 3.0)])
    write_lines(tmp_path / "b" / "metrics.jsonl", [record(1, 5.0), record(4, float("nan"))])
    (tmp_path / "a" / "evaluation.json").write_text('{"zero_shot": {"task": {"top1": 0.25}}}')
    assert {run.name for run in find_runs(tmp_path)} == {"early", "a", "b"}
    runner = CliRunner()
    listed = runner.invoke(app, ["runs", "--folder", str(tmp_path)], terminal_width=200).output
    assert re.search(r"│ a +│ +2 │ 3.000 │ +25.0% │ +50 │", listed)
    assert re.search(r"│ early │ +- │", listed)
    compared = runner.invoke(app, ["runs", "a", "b", "--folder", str(tmp_path)]).output
    assert re.search(r"optim.lr │ 1.0 │ 2.0", compared)
    assert re.search(r"20 │ 3.000 │ 5.000", compared)
    assert "a: loss █▁" in compared
    missing = runner.invoke(app, ["runs", "--folder", str(tmp_path / "none")])
    assert isinstance(missing.exception, VlmError)


def test_nested_settings_have_dotted_keys() -> None:
    assert flat({"a": {"b": [1, {"c": 2}]}, "d": None}) == {"a.b.0": 1, "a.b.1.c": 2, "d": None}


def test_a_chart_leaves_out_what_is_not_finite_and_escapes_names() -> None:
    drawn = chart(
        {"a<b": [(0.0, 1.0), (1.0, math.nan), (2.0, 3.0)], "one": [(1.0, 2.0)]}, label="x"
    )
    assert drawn.count('<polyline class="line"') == 1
    assert drawn.count("<circle") == 1
    assert "a&lt;b" in drawn
    assert "nan" not in drawn
    assert "nothing" in chart({"a": [(0.0, math.inf)]}, label="x")


def test_geometry_of_rows_that_waste_no_direction_is_at_its_best() -> None:
    even, alike = torch.eye(8), torch.ones(8, 8) / 8**0.5
    found = watch_geometry(DualEncoderOutput(image=even, text=alike, logit_scale=torch.ones(1)))
    assert_close(found["effective_rank/image"], torch.tensor(8.0), rtol=1e-5, atol=0)
    assert_close(found["effective_rank/text"], torch.tensor(1.0), rtol=1e-3, atol=0)
    assert_close(found["uniformity_above_floor/text"], torch.tensor(3.0))  # 0 - (-4 + 8/8)
    spread = unit_rows(2000, 64).float()
    found = watch_geometry(DualEncoderOutput(image=spread, text=spread, logit_scale=torch.ones(1)))
    assert abs(found["uniformity_above_floor/image"]) < 0.01


def test_a_tower_without_gradient_has_no_norm() -> None:
    model = nn.ModuleDict({"image": nn.Linear(2, 2, bias=False), "text": nn.Linear(2, 2)})
    model["image"].weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert watch_gradients(model) == {"gradient_norm/image": torch.tensor(5.0)}


def test_the_arithmetic_of_a_matrix_is_six_operations_a_weight(tmp_path: Path) -> None:
    """Forward 2, backward 4; attention and the input's gradient shift it a little."""
    config = configured(tmp_path, model={
        "dim": 64,
        "image": {"type": "vit", "width": 64, "layers": 4, "head_width": 32, "patch_size": 8},
        "text": {"type": "transformer", "width": 8, "layers": 1, "heads": 1, "vocab_size": 49408},
    })  # fmt: skip
    block, places = 12 * 64 * 64, 5  # weights of a block's matrices
    # In the last of four blocks all places are keys and values, and one is all the rest.
    last = block * (2 * places + 10) / 12
    assert flops_per_sample(config) == pytest.approx(6 * (3 * block * places + last), rel=0.1)
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(("samples", "warned"), [(8, True), (12, False)])
def test_a_step_that_is_larger_than_the_data_is_warned_of(
    tmp_path: Path, samples: int, warned: bool
) -> None:
    write_dataset(tmp_path / "shards", samples)
    told = io.StringIO()
    config = configured(tmp_path, steps=1)
    train(config, world=World(), console=Console(file=told, soft_wrap=True), resume=False)
    assert ("lower global_batch to 4 or less" in told.getvalue()) is warned
