"""The whole loop on a small real dataset: what it learns, from what, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.support import TINY_MODEL, drawn_samples, write_dataset
from tests.vlm.train.runs import (
    REMEMBERING,
    assert_same_weights,
    configured,
    forget_after,
    quiet,
    records,
    run,
    train_on_ranks,
    tree,
)
from vlm.data.manifest import build_manifest
from vlm.data.samples import Sample
from vlm.data.write import write_shards
from vlm.distributed import World
from vlm.errors import ConfigError, VlmError
from vlm.evaluation import embed_shards, recall
from vlm.inference import Encoder
from vlm.train import train
from vlm.train.checkpoint import latest_checkpoint
from vlm.train.export import load_run
from vlm.train.places import checkpoint_place


@pytest.fixture(autouse=True)
def _dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 64)


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


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, optim={"type": "adamw", "lr": 1e30, "clip_norm": None},
                        checkpoint_every=100)  # fmt: skip
    with pytest.raises(VlmError, match=r"is (nan|inf) at step \d+.*Lower optim.lr"):
        run(config)
    assert latest_checkpoint(checkpoint_place(config)) is None


def test_epochs_and_steps_are_one_or_the_other(tmp_path: Path) -> None:
    assert configured(tmp_path, steps=None, epochs=1.5).total_steps(64) == 8
    with pytest.raises(ConfigError, match="exactly one of steps, samples and epochs"):
        configured(tmp_path, epochs=1)
    with pytest.raises(ConfigError, match="siglip needs a logit bias"):
        configured(tmp_path, loss=[{"type": "siglip"}])


def test_a_batch_that_does_not_divide_over_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="global_batch=12 does not divide over 5 ranks"):
        train(configured(tmp_path), world=World(size=5), console=quiet(), resume=False)


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
