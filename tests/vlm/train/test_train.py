"""The whole loop on a small real dataset: learning, resuming, and everything that can go wrong."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.support import TINY_MODEL, drawn_samples, tiny_bundle, write_dataset
from vlm.config import validate_config
from vlm.data.manifest import build_manifest
from vlm.data.samples import Sample
from vlm.data.write import write_shards
from vlm.distributed import World
from vlm.errors import CheckpointError, ConfigError, VlmError
from vlm.evaluation import embed_shards, recall
from vlm.inference import Encoder, load_bundle
from vlm.train import TrainConfig, train
from vlm.train.checkpoint import latest_checkpoint, load_weights
from vlm.train.export import export_run, load_run

REMEMBERING: list[dict[str, Any]] = [
    {"type": "fastclip_v3", "gamma": 0.3},
    {"type": "isogclr", "weight": 0.2, "init_temperature": 0.1},
    {"type": "alignment", "weight": {"at": [0, 1], "value": [0, 1]}, "guard": {"gap_floor": 1.0}},
]


def tree(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "run",
        "output": str(tmp_path / "runs"),
        "steps": 12,
        "global_batch": 12,
        "image": {"size": 32},
        "tokenizer": {"context_length": 12},
        "data": {
            "shards": str(tmp_path / "shards"),
            "stream": {"group_field": "concept", "captions": {"text": 0.5, "tags": 0.5}},
            "augment": {"margin": 1.25, "min_scale": 0.8, "rotation_degrees": 10, "contrast": 0.2},
        },
        "model": TINY_MODEL,
        "loss": [{"type": "clip"}, {"type": "alignment", "weight": 0.1},
                 {"type": "uniformity", "weight": 0.1}],
        "optim": {"type": "lion", "lr": 2e-3, "weight_decay": 0.1},
        "engine": {"type": "torch", "precision": "fp32"},
        "ema_decay": 0.9,
        "log_every": 2,
        "checkpoint_every": 5,
    }  # fmt: skip
    return {**base, **changes}


def configured(tmp_path: Path, **changes: Any) -> TrainConfig:
    return validate_config(TrainConfig, tree(tmp_path, **changes), source="test")


def quiet() -> Console:
    return Console(quiet=True)


def run(config: TrainConfig, *, resume: bool = False) -> int:
    return train(config, world=World(), console=quiet(), resume=resume).step


def final_weights(config: TrainConfig, name: str = "model") -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(config.run_folder / "checkpoints")
    assert checkpoint is not None
    weights = load_weights(checkpoint, ema=name == "ema")
    assert weights is not None
    return weights


def records(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(autouse=True)
def _dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 64)


def assert_same_weights(a: TrainConfig, b: TrainConfig) -> None:
    for name in ("model", "ema"):
        first, second = final_weights(a, name), final_weights(b, name)
        assert first.keys() == second.keys()
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different


@pytest.mark.slow
def test_training_learns_to_match_drawings_with_captions(tmp_path: Path) -> None:
    config = configured(
        tmp_path, steps=150, global_batch=32, loss=[{"type": "clip"}], ema_decay=None,
        optim={"type": "lion", "lr": 1e-3, "weight_decay": 0.1}, checkpoint_every=500,
    )  # fmt: skip
    run(config)
    data = embed_shards(Encoder(load_run(config.run_folder)), tmp_path / "shards")
    groups = data.groups("concept")
    found = recall(data.texts, data.images, groups, groups)
    assert found.chance < 0.07
    assert found.recall1 > 0.4
    assert found.recall5 > 0.9


def test_the_log_tells_loss_terms_scale_gap_and_rate(tmp_path: Path) -> None:
    config = configured(tmp_path)
    assert run(config) == 12
    assert [r["step"] for r in records(config)] == [2, 4, 6, 8, 10, 12]
    last = records(config)[-1]
    assert last["samples"] == 144
    for name in ("loss", "clip", "alignment", "uniformity", "logit_scale", "modality_gap",
                 "gradient_norm", "lr", "samples_per_second", "data_wait_fraction",
                 "clip/same_group_fraction"):  # fmt: skip
        assert name in last
    expected = last["clip"] + 0.1 * last["alignment"] + 0.1 * last["uniformity"]
    assert last["loss"] == pytest.approx(expected, abs=1e-5)


def test_two_runs_of_one_seed_are_bitwise_equal_and_other_seeds_are_not(tmp_path: Path) -> None:
    first, second = configured(tmp_path), configured(tmp_path, name="again")
    other = configured(tmp_path, name="other", seed=1)
    for config in (first, second, other):
        run(config)
    assert_same_weights(first, second)
    with pytest.raises(AssertionError):
        assert_same_weights(first, other)


def forget_after(config: TrainConfig, step: int) -> None:
    """As if the machine had died before the next checkpoint."""
    for folder in (config.run_folder / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(tmp_path: Path) -> None:
    straight = configured(tmp_path, name="straight")
    run(straight)
    broken = configured(tmp_path, name="broken", keep_checkpoints=9)
    run(broken)
    forget_after(broken, 5)
    (broken.run_folder / "checkpoints" / ".draft-00000010").mkdir()
    assert run(broken, resume=True) == 12
    assert_same_weights(straight, broken)
    drop = ("samples_per_second", "data_wait_fraction", "goodput", "mfu")
    kept = [[{k: v for k, v in r.items() if k not in drop} for r in records(c)]
            for c in (straight, broken)]  # fmt: skip
    assert kept[0] == kept[1]


def command(tmp_path: Path, name: str, **changes: Any) -> list[str]:
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path, name=name, steps=60, **changes)))
    return [sys.executable, "-m", "vlm", "train", str(path), "--resume"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_for_step(config: TrainConfig, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = config.run_folder / "metrics.jsonl"
        if path.is_file() and path.read_text().count("\n") * 2 >= step:
            return
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_process_resumes_to_the_same_weights(
    tmp_path: Path, number: signal.Signals
) -> None:
    straight = configured(tmp_path, name="straight", steps=60)
    subprocess.run(
        command(tmp_path, "straight"), check=True, env=environment(), capture_output=True
    )
    broken = configured(tmp_path, name="broken", steps=60)
    process = subprocess.Popen(
        command(tmp_path, "broken"), env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_step(broken, random.Random(number).randrange(6, 40), process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 75, errors
        assert "checkpoint saved" in output
        assert "--resume" in output
    assert not list(broken.run_folder.rglob(".*draft*")) or number == signal.SIGKILL
    done = subprocess.run(
        command(tmp_path, "broken"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same_weights(straight, broken)


def train_on_ranks(world: World, config: TrainConfig, resume: bool) -> int:
    return train(config, world=world, console=quiet(), resume=resume).step


@pytest.mark.parametrize("loss", [None, REMEMBERING], ids=["plain", "remembering"])
def test_micro_batches_train_what_the_whole_batch_trains(
    tmp_path: Path, loss: list[dict[str, Any]] | None
) -> None:
    changes: dict[str, Any] = {"steps": 4, "optim": {"type": "lion", "lr": 1e-3}}
    changes |= {} if loss is None else {"loss": loss}
    whole = configured(tmp_path, name="whole", **changes)
    parts = configured(tmp_path, name="parts", micro_batch=4, **changes)
    assert run(whole) == run(parts) == 4
    for key in ("loss", "gradient_norm"):
        assert [r[key] for r in records(parts)] == pytest.approx(
            [r[key] for r in records(whole)], rel=2e-5
        )


def test_micro_batches_that_do_not_divide_a_ranks_share_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each of 1 ranks 12 samples.*micro_batch=5; choose a di"):
        run(configured(tmp_path, micro_batch=5))


@pytest.mark.slow
@pytest.mark.distributed
def test_any_number_of_ranks_trains_the_same_model(tmp_path: Path) -> None:
    # At twice this rate a sign that rounding turns shows in the loss; the sums are equal at both.
    optim = {"type": "lion", "lr": 1e-3, "weight_decay": 0.1}
    one = configured(tmp_path, name="one", optim=optim)
    run(one)
    two = configured(tmp_path, name="two", optim=optim)
    assert run_ranks(2, train_on_ranks, two, False) == [12, 12]
    three_then_one = configured(tmp_path, name="mixed", keep_checkpoints=9, optim=optim)
    run_ranks(3, train_on_ranks, three_then_one, False)
    for path in (three_then_one.run_folder / "checkpoints").glob("step-0000001*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    run(three_then_one, resume=True)
    for other in (two, three_then_one):
        assert [r["loss"] for r in records(other)] == pytest.approx(
            [r["loss"] for r in records(one)], rel=2e-5
        )


def test_a_run_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    run(configured(tmp_path))
    with pytest.raises(CheckpointError, match="has checkpoints up to step 12. Continue it with"):
        run(configured(tmp_path))


def test_a_checkpoint_of_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    run(configured(tmp_path))
    changed = configured(tmp_path, seed=4, optim={"type": "lion", "lr": 1e-4})
    with pytest.raises(CheckpointError, match="these differ: seed, optim"):
        run(changed, resume=True)


def test_other_data_are_refused(tmp_path: Path) -> None:
    run(configured(tmp_path))
    write_dataset(tmp_path / "other", 65)
    data = {**tree(tmp_path)["data"], "shards": str(tmp_path / "other")}
    with pytest.raises(CheckpointError, match="these differ: sources, data_fingerprint"):
        run(configured(tmp_path, data=data), resume=True)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run(config)
    before = (config.run_folder / "metrics.jsonl").read_bytes()
    assert run(config, resume=True) == 12
    assert (config.run_folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["model-00000.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_left_aside_for_the_one_before(tmp_path: Path, name: str) -> None:
    config = configured(tmp_path, checkpoint_every=4, keep_checkpoints=3)
    run(config)
    expected = final_weights(config)
    folder = config.run_folder / "checkpoints"
    torn = folder / "step-00000012" / name
    torn.write_bytes(torn.read_bytes()[:-9])
    heard = io.StringIO()
    train(config, world=World(), console=Console(file=heard, width=500), resume=True)
    said = heard.getvalue()
    assert re.search(r"left aside: .*step-00000012/checkpoint.json: damaged \(", said)
    assert name in said
    assert "from step 8" in said
    assert (folder / "damaged-00000012").is_dir()
    found = final_weights(config)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for path in folder.glob(f"*/{name}"):
        path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=f"no checkpoint can be used.*{name}"):
        run(config, resume=True)


def test_a_checkpoint_holds_tensors_and_text_alone(tmp_path: Path) -> None:
    config = configured(tmp_path, steps=1)
    run(config)
    checkpoint = latest_checkpoint(config.run_folder / "checkpoints")
    assert checkpoint is not None
    names = sorted(path.name for path in checkpoint.folder.iterdir())
    assert names == ["checkpoint.json", "ema-00000.safetensors", "model-00000.safetensors",
                     "optimizer-00000.safetensors"]  # fmt: skip


def test_a_full_disk_costs_no_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, steps=5)
    run(config)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm.train.shards.save_file", full)
    other = configured(tmp_path, name="other")
    with pytest.raises(CheckpointError, match="No space left on device.*free some space"):
        run(other)
    assert list((other.run_folder / "checkpoints").iterdir()) == []
    assert latest_checkpoint(config.run_folder / "checkpoints") is not None


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, optim={"type": "adamw", "lr": 1e30, "clip_norm": None},
                        checkpoint_every=100)  # fmt: skip
    with pytest.raises(VlmError, match=r"is (nan|inf) at step \d+.*Lower optim.lr"):
        run(config)
    assert latest_checkpoint(config.run_folder / "checkpoints") is None


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    config = configured(tmp_path, checkpoint_every=3, keep_checkpoints=2)
    run(config)
    folders = sorted(p.name for p in (config.run_folder / "checkpoints").iterdir())
    assert folders == ["step-00000009", "step-00000012"]


def test_epochs_and_steps_are_one_or_the_other(tmp_path: Path) -> None:
    assert configured(tmp_path, steps=None, epochs=1.5).total_steps(64) == 8
    with pytest.raises(ConfigError, match="exactly one of steps, samples and epochs"):
        configured(tmp_path, epochs=1)
    with pytest.raises(ConfigError, match="siglip needs a logit bias"):
        configured(tmp_path, loss=[{"type": "siglip"}])


def test_a_batch_that_does_not_divide_over_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="global_batch=12 does not divide over 5 ranks"):
        train(configured(tmp_path), world=World(size=5), console=quiet(), resume=False)


def test_an_exported_run_is_a_bundle_with_means_metrics_and_provenance(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run(config)
    fingerprint = load_run(config.run_folder).info.fingerprint
    evaluation = {"model": {"fingerprint": fingerprint}, "results": {"zero_shot/t": {"top1": 0.5}}}
    (config.run_folder / "evaluation.json").write_text(json.dumps(evaluation))
    info = export_run(config.run_folder, tmp_path / "bundle", console=quiet())
    assert info.fingerprint == fingerprint
    assert info.metrics == {"zero_shot/t": {"top1": 0.5}}
    assert info.provenance["samples_seen"] == 144
    assert info.provenance["config"]["optim"]["type"] == "lion"
    assert info.modality_means is not None
    assert info.modality_means.num_pairs == 64
    encoder = Encoder(load_bundle(tmp_path / "bundle"))
    data = embed_shards(encoder, tmp_path / "shards")
    assert info.modality_means.text == pytest.approx(data.texts.mean(0).tolist(), abs=1e-6)


def test_metrics_of_other_weights_are_left_out(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run(config)
    (config.run_folder / "evaluation.json").write_text('{"model": {"fingerprint": "0"}}')
    assert export_run(config.run_folder, tmp_path / "b", console=quiet()).metrics == {}


def test_the_average_of_weights_is_what_is_exported(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run(config)
    exported = load_run(config.run_folder).model.state_dict()
    average = final_weights(config, "ema")
    assert all(torch.equal(exported[key], average[key]) for key in average)


def test_a_folder_without_checkpoint_says_to_train(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here; train it first"):
        load_run(tmp_path)


def test_a_bad_sample_is_replaced_counted_and_written_down(tmp_path: Path) -> None:
    samples = drawn_samples(48)
    broken = b"\xff\xd8\xff broken"
    samples[20] = Sample(key="torn", image=broken, text="x", metadata={"concept": "x"})
    write_shards(samples, tmp_path / "shards", prefix="p", samples_per_shard=10)
    build_manifest(tmp_path / "shards")
    stream: dict[str, Any] = {**tree(tmp_path)["data"]["stream"], "max_bad_fraction": 0.03}
    data: dict[str, Any] = {**tree(tmp_path)["data"], "stream": stream}
    config = configured(tmp_path, data=data)
    assert run(config) == 12
    assert records(config)[-1]["quarantined"] == 1
    (line,) = (config.run_folder / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["shard"], entry["key"]) == ("p-000002.tar", "torn")


def test_a_mixture_trains_logs_its_shares_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    write_dataset(tmp_path / "others", 40)
    data = {
        "sources": [
            {"name": "many", "shards": str(tmp_path / "shards"), "weight": 3},
            {"name": "few", "shards": str(tmp_path / "others"), "captions": {"tags": 1, "text": 0}},
        ],
        "curriculum": [{"from_step": 6, "weights": {"many": 1, "few": 3}}],
        "stream": {"group_field": "concept"},
    }
    whole = configured(tmp_path, name="whole", data=data)
    run(whole)
    shares = {record["step"]: record["share/many"] for record in records(whole)}
    assert shares[6] == pytest.approx(0.75, abs=0.03)
    assert shares[12] == pytest.approx(0.5, abs=0.03)

    halves = configured(tmp_path, name="halves", data=data, keep_checkpoints=9)
    run(halves)
    forget_after(halves, 5)
    run(halves, resume=True)
    assert_same_weights(whole, halves)


def test_several_views_train_and_resume_to_the_same_weights(tmp_path: Path) -> None:
    data = tree(tmp_path)["data"]
    data["augment"] = {
        "min_area": 0.3, "aspect": 0.28, "blur_probability": 0.5, "solarise_probability": 0.2,
        "views": {"full": 2, "small": 1},
    }  # fmt: skip
    data["stream"]["captions"] = {"templates": ["a drawing of {}"], "augment": {"repeat": 0.3}}
    whole = configured(tmp_path, name="whole", data=data)
    run(whole)
    halves = configured(tmp_path, name="halves", data=data, keep_checkpoints=9)
    run(halves)
    forget_after(halves, 5)
    run(halves, resume=True)
    assert_same_weights(whole, halves)


def test_small_views_of_another_size_need_a_tower_that_reads_them(tmp_path: Path) -> None:
    data = tree(tmp_path)["data"]
    data["augment"] = {"views": {"small": 1, "small_size": 16}}
    with pytest.raises(ConfigError, match="a vit tower reads 32 pixels only"):
        configured(tmp_path, data=data)
    model = {**TINY_MODEL, "image": {"type": "timm", "name": "resnet10t"}}
    assert run(configured(tmp_path, data=data, model=model, steps=2)) == 2


def final_memory(config: TrainConfig) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(config.run_folder / "checkpoints")
    assert checkpoint is not None
    return load_file(checkpoint.folder / "memory-00000.safetensors")


def test_a_loss_that_remembers_resumes_to_the_same_weights_and_memory(tmp_path: Path) -> None:
    straight = configured(tmp_path, name="straight", loss=REMEMBERING)
    broken = configured(tmp_path, name="broken", loss=REMEMBERING, keep_checkpoints=9)
    run(straight)
    run(broken)
    forget_after(broken, 5)
    assert run(broken, resume=True) == 12
    assert_same_weights(straight, broken)
    first, second = final_memory(straight), final_memory(broken)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    seen = first["fastclip_v3/log_image"].isfinite()
    assert len(seen) == 64
    assert int(seen.sum()) > 32
    assert not torch.equal(first["isogclr/temperature_text"], torch.full((64,), 0.1))


def test_a_loss_that_remembers_more_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    run(configured(tmp_path))
    with pytest.raises(CheckpointError, match="remembers nothing of sogclr/log_image"):
        run(configured(tmp_path, loss=[{"type": "sogclr"}]), resume=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_remember_what_one_process_does(tmp_path: Path) -> None:
    optim = {"type": "lion", "lr": 1e-3, "weight_decay": 0.1}
    one = configured(tmp_path, name="one", loss=REMEMBERING, optim=optim)
    two = configured(tmp_path, name="two", loss=REMEMBERING, optim=optim, keep_checkpoints=9)
    run(one)
    assert run_ranks(2, train_on_ranks, two, False) == [12, 12]
    assert [r["loss"] for r in records(two)] == pytest.approx(
        [r["loss"] for r in records(one)], rel=2e-5
    )
    forget_after(two, 5)
    run(two, resume=True)  # on one process, from the parts of both
    assert [r["loss"] for r in records(two)] == pytest.approx(
        [r["loss"] for r in records(one)], rel=2e-5
    )


def test_a_run_follows_a_teacher_and_resumes_with_no_other(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "teacher", seed=1)
    tiny_bundle(tmp_path / "another", seed=2)
    loss: list[dict[str, Any]] = [
        {"type": "distillation"}, {"type": "soft_clip", "weight": 0.5},
        {"type": "clip", "weight": 0.1, "false_negatives": {"cosine": 0.9}},
    ]  # fmt: skip
    config = configured(tmp_path, loss=loss, teacher={"bundle": str(tmp_path / "teacher")})
    run(config)
    found = records(config)
    assert found[-1]["distillation"] < found[0]["distillation"]
    assert 0 <= found[-1]["clip/masked_fraction"] <= 1
    changed = configured(tmp_path, loss=loss, teacher={"bundle": str(tmp_path / "another")})
    with pytest.raises(CheckpointError, match="these differ: teacher"):
        run(changed, resume=True)
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    moved = configured(tmp_path, loss=loss, teacher={"bundle": str(tmp_path / "moved")})
    assert run(moved, resume=True) == 12


def test_a_term_and_a_teacher_need_each_other(tmp_path: Path) -> None:
    teacher = {"bundle": "somewhere"}
    loss: list[dict[str, Any]]
    for loss in ([{"type": "distillation"}], [{"type": "dcl", "false_negatives": {}}]):
        with pytest.raises(ConfigError, match="needs a teacher: set teacher.bundle"):
            configured(tmp_path, loss=loss)
        assert configured(tmp_path, loss=loss, teacher=teacher).teacher is not None
    with pytest.raises(ConfigError, match="no term of the loss asks the teacher"):
        configured(tmp_path, teacher=teacher)
    with pytest.raises(ConfigError, match="soft_clip compares labels: set data.stream.label_field"):
        configured(tmp_path, loss=[{"type": "soft_clip", "similarity": "labels"}])
    twice = [{"type": "sogclr"}, {"type": "sogclr"}]
    with pytest.raises(ConfigError, match="sogclr is listed twice"):
        configured(tmp_path, loss=twice)


@pytest.mark.slow
def test_a_killed_process_that_remembers_resumes_to_the_same_memory(tmp_path: Path) -> None:
    straight, broken = (
        configured(tmp_path, name=name, steps=60, loss=REMEMBERING)
        for name in ("straight", "broken")
    )
    run(straight)
    process = subprocess.Popen(
        command(tmp_path, "broken", loss=REMEMBERING), env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_step(broken, 17, process)
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -9
    again = command(tmp_path, "broken", loss=REMEMBERING)
    subprocess.run(again, check=True, env=environment(), capture_output=True)
    assert_same_weights(straight, broken)
    first, second = final_memory(straight), final_memory(broken)
    assert all(torch.equal(first[name], second[name]) for name in first)
