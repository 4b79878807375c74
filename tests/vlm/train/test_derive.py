"""Models made of trained models: refined ones and soups."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.distributed import run_ranks
from tests.support import TINY_MODEL, tiny_bundle, write_dataset
from vlm.config import validate_config
from vlm.distributed import World
from vlm.errors import BundleError, CheckpointError, DataError
from vlm.inference import load_bundle, save_bundle
from vlm.models import DualEncoder, DualEncoderConfig
from vlm.preprocess import ImageConfig, TokenizerConfig
from vlm.train import TrainConfig, train
from vlm.train.derive import load_origin
from vlm.train.refine import RefineConfig, refine
from vlm.train.signals import Stop
from vlm.train.soup import average_states, make_soup


def test_an_average_is_that_of_the_weights_and_counters_are_kept() -> None:
    states = [
        {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([3.0, 6.0]), "n": torch.tensor(9)},
    ]
    found = average_states(states, [0.25, 0.75])
    assert found["w"].tolist() == [2.5, 5.0]
    assert int(found["n"]) == 3


def test_a_soup_lies_between_its_models_and_its_ends_are_they(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 24)
    paths = [tmp_path / name for name in ("a", "b")]
    infos = [tiny_bundle(path, seed=seed) for seed, path in enumerate(paths)]
    mean = make_soup(paths, tmp_path / "mean", alpha=None, shards=[tmp_path / "shards"])
    start = make_soup(paths, tmp_path / "start", alpha=0.0, shards=[])
    assert start.fingerprint == infos[0].fingerprint
    assert start.modality_means is None
    assert mean.modality_means is not None
    assert mean.modality_means.num_pairs == 24
    assert [part["weight"] for part in mean.provenance["soup"]] == [0.5, 0.5]
    states = [load_bundle(p).model.state_dict() for p in (*paths, tmp_path / "mean")]
    for name, tensor in states[2].items():
        assert torch.allclose(tensor, (states[0][name] + states[1][name]) / 2, atol=1e-6), name


def test_models_that_cannot_be_averaged_are_refused(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "a")
    config = DualEncoderConfig.model_validate({**TINY_MODEL, "dim": 8})
    model_cfg = config.open_clip_config(image_size=32, context_length=12)
    save_bundle(
        tmp_path / "narrow", DualEncoder(model_cfg), name="narrow", open_clip_config=model_cfg,
        image=ImageConfig(size=32), tokenizer=TokenizerConfig(context_length=12),
    )  # fmt: skip
    same = DualEncoderConfig.model_validate(TINY_MODEL)
    model_cfg = same.open_clip_config(image_size=32, context_length=12)
    save_bundle(
        tmp_path / "grey", DualEncoder(model_cfg), name="grey", open_clip_config=model_cfg,
        image=ImageConfig(size=32, mean=(0.5, 0.5, 0.5)),
        tokenizer=TokenizerConfig(context_length=12),
    )  # fmt: skip
    a, narrow, out = tmp_path / "a", tmp_path / "narrow", tmp_path / "out"
    with pytest.raises(BundleError, match="grey and .*a differ in their image settings"):
        make_soup([a, tmp_path / "grey"], out, alpha=None, shards=[])
    with pytest.raises(BundleError, match="another architecture than .*a: .* weights differ"):
        make_soup([a, narrow], out, alpha=None, shards=[])
    with pytest.raises(BundleError, match=r"alpha=0.5 needs exactly two, .* got 3"):
        make_soup([a, a, a], out, alpha=0.5, shards=[])
    with pytest.raises(BundleError, match="neither a bundle .* nor a run .* nor a checkpoint"):
        make_soup([a, tmp_path / "nothing"], out, alpha=None, shards=[])
    assert not out.exists()


def test_refining_brings_raw_features_nearer_and_is_the_same_again(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 40)
    info = tiny_bundle(tmp_path / "bundle")
    config = RefineConfig(batch=16, epochs=3, lr=1e-3, log_every=1)
    said: list[str] = []
    found = [
        refine(tmp_path / "bundle", tmp_path / "shards", tmp_path / out, config, say=said.append)
        for out in ("one", "two")
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].fingerprint == found[1].fingerprint != info.fingerprint
    assert found[0].provenance["refined_from"] == info.fingerprint
    assert found[0].provenance["steps"] == 6
    assert found[0].modality_means is not None
    assert found[0].logit_scale == info.logit_scale
    assert len(said) == 12
    alignment = [float(line.split("alignment ")[1].split()[0]) for line in said[:6]]
    assert alignment[-1] < 0.95 * alignment[0]
    with pytest.raises(DataError, match="40 pairs do not fill one batch of 64; set batch=40"):
        refine(tmp_path / "bundle", tmp_path / "shards", tmp_path / "three", RefineConfig(batch=64))
    assert not (tmp_path / "three").exists()
    (tmp_path / "taken").mkdir()
    with pytest.raises(BundleError, match="taken: exists and is not a bundle"):
        refine(tmp_path / "gone", tmp_path / "shards", tmp_path / "taken", config)
    with pytest.raises(BundleError, match="taken: exists and is not a bundle"):
        make_soup([tmp_path / "gone"] * 2, tmp_path / "taken", alpha=None, shards=[])


def test_refining_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 40)
    tiny_bundle(tmp_path / "bundle")
    config = RefineConfig(batch=16, epochs=3, lr=1e-3, log_every=1)
    model, shards, said = tmp_path / "bundle", tmp_path / "shards", list[str]()
    straight = refine(model, shards, tmp_path / "straight", config)
    stop = Stop()

    def stop_at_three(line: str) -> None:
        said.append(line)
        stop.requested = line.startswith("step 3/6")

    out = tmp_path / "stopped"
    assert refine(model, shards, out, config, say=stop_at_three, stop=stop) is None
    assert not out.exists()
    other = config.model_copy(update={"lr": 2e-3})
    with pytest.raises(CheckpointError, match="unfinished work with another settings"):
        refine(model, shards, out, other)
    resumed = refine(model, shards, out, config, say=said.append)
    assert said[3] == "going on after step 3/6"
    assert len(said) == 7
    assert straight is not None
    assert resumed is not None
    assert resumed.fingerprint == straight.fingerprint
    assert [path.name for path in tmp_path.glob(".*")] == []
    (tmp_path / ".torn.refining.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"damaged .* remove it to start"):
        refine(model, shards, tmp_path / "torn", config)


def train_sharded(world: World, tree: dict[str, Any]) -> None:
    config = validate_config(TrainConfig, tree, source="test")
    train(config, world=world, console=Console(quiet=True), resume=False)


@pytest.mark.distributed
def test_checkpoints_in_several_shards_are_averaged_and_refined(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 32)
    tree = {
        "name": "run", "output": str(tmp_path), "steps": 2, "global_batch": 8,
        "image": {"size": 32}, "tokenizer": {"context_length": 8},
        "data": {"shards": str(tmp_path / "shards")}, "model": TINY_MODEL,
        "loss": [{"type": "clip"}], "optim": {"type": "lion", "lr": 1e-3},
        "engine": {"type": "fsdp", "precision": "fp32"}, "ema_decay": None, "checkpoint_every": 1,
    }  # fmt: skip
    run_ranks(2, train_sharded, tree)
    first, last = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    assert len(list(last.glob("model-*.safetensors"))) == 2
    make_soup([first, last], tmp_path / "mean", alpha=None, shards=[])
    parts = [load_origin(p).bundle.model.state_dict() for p in (first, last, tmp_path / "run")]
    mean = load_bundle(tmp_path / "mean").model.state_dict()
    moved = [name for name in mean if not torch.equal(parts[0][name], parts[1][name])]
    assert len(moved) > 10
    for name, tensor in mean.items():
        assert torch.equal(parts[1][name], parts[2][name]), name
        if tensor.is_floating_point():
            assert torch.allclose(tensor, (parts[0][name] + parts[1][name]) / 2, atol=1e-6), name
    refined = refine(first, tmp_path / "shards", tmp_path / "refined", RefineConfig(batch=16))
    assert refined is not None
    assert refined.provenance["refined_from"] == load_origin(first).bundle.info.fingerprint


def test_the_verb_says_what_is_wrong_with_its_settings(tmp_path: Path) -> None:
    def vlm(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vlm", *arguments], capture_output=True, text=True, check=False
        )

    done = vlm("refine", "/x", "bach=2", "--shards", "/x", "--out", str(tmp_path / "x"))
    assert (done.returncode, "did you mean 'batch'?" in done.stderr) == (2, True)
