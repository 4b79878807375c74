"""CoCa through the whole loop: it learns, leaves as a bundle, and writes what it has learnt."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from rich.console import Console

from tests.support import TINY_COCA, drawing, tiny_bundle, write_dataset
from vlm.config import validate_config
from vlm.distributed import World
from vlm.errors import BundleError, ConfigError
from vlm.evaluation import EvaluationConfig, evaluate_with_evidence, subject_of_bundle
from vlm.evaluation.tasks.captioning import CaptioningResult
from vlm.inference import (
    Bundle,
    Captioner,
    Encoder,
    GreedySearch,
    NucleusSampling,
    load_bundle,
    read_bundle_info,
    save_bundle,
)
from vlm.models import CoCa, CocaConfig
from vlm.preprocess import ImageConfig, TokenizerConfig, decode_image
from vlm.train import TrainConfig, train
from vlm.train.export import export_run

PICTURES = [drawing(colour, shape) for colour in ("red", "blue") for shape in ("circle", "square")]


def configured(tmp_path: Path, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "name": "run", "output": str(tmp_path / "runs"), "steps": 4, "global_batch": 12,
        "image": {"size": 32}, "tokenizer": {"context_length": 8},
        "data": {"shards": str(tmp_path / "shards"), "stream": {"group_field": "concept"}},
        "model": TINY_COCA,
        "loss": [{"type": "clip"}, {"type": "caption", "weight": 2.0}],
        "optim": {"type": "lion", "lr": 1e-3, "weight_decay": 0.1},
        "engine": {"type": "torch", "precision": "fp32"}, "ema_decay": 0.9,
        "log_every": 1, "checkpoint_every": 2,
    }  # fmt: skip
    return validate_config(TrainConfig, {**base, **changes}, source="test")


def run(config: TrainConfig, *, resume: bool = False) -> list[dict[str, Any]]:
    write_dataset(config.run_folder.parents[1] / "shards", 64)
    train(config, world=World(), console=Console(quiet=True), resume=resume)
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def coca_bundle(folder: Path, *, seed: int = 0, image: dict[str, Any] | None = None) -> CoCa:
    torch.manual_seed(seed)
    tree = {**TINY_COCA, "image": image or TINY_COCA["image"]}
    model = CoCa(CocaConfig.model_validate(tree), image_size=32, context_length=8).eval()
    save_bundle(
        folder, model, name="tiny", image=ImageConfig(size=32),
        tokenizer=TokenizerConfig(context_length=8),
    )  # fmt: skip
    return model


@pytest.mark.slow
def test_a_coca_learns_to_name_colour_and_shape_of_drawings(tmp_path: Path) -> None:
    config = configured(
        tmp_path, steps=400, global_batch=32, log_every=10, checkpoint_every=500, ema_decay=None,
        optim={"type": "lion", "lr": 2e-3, "weight_decay": 0.1},
    )  # fmt: skip
    records = run(config)
    last = records[-1]
    assert records[0]["caption"] > 5
    # Blind to the image, 8 colours and 2 shapes cost ln 16 / 4 = 0.69 for each of a, 2 words, end.
    assert last["caption"] < 0.1  # colours are learnt before shapes, by step 300
    assert last["caption/perplexity"] == pytest.approx(np.exp(last["caption"]), rel=1e-4)
    export_run(config.run_folder, tmp_path / "b", console=Console(quiet=True))
    captions = Captioner.load(tmp_path / "b").caption(PICTURES)
    assert captions == ["a red circle", "a red square", "a blue circle", "a blue square"]


def test_what_a_trained_coca_writes_is_scored(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run(config)
    export_run(config.run_folder, tmp_path / "b", console=Console(quiet=True))
    bundle = load_bundle(tmp_path / "b")
    tree = {
        "datasets": {"d": {"type": "shards", "location": str(tmp_path / "shards")}},
        "tasks": [{"type": "captioning", "data": "d", "max_images": 3}],
    }
    settings = validate_config(EvaluationConfig, tree, source="test")
    with evaluate_with_evidence(subject_of_bundle(bundle), settings) as (found, evidence):
        result = found.results["captioning/d"]
        assert isinstance(result, CaptioningResult)
        images = [decode_image(evidence.datasets["d"].source.item(row).image) for row in range(3)]
    assert (result.images, len(result.best)) == (3, 3)
    by_row = [example.written for example in sorted(result.best, key=lambda e: e.row)]
    assert by_row == Captioner(bundle).caption(images)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = configured(tmp_path, name="whole")
    run(whole)
    run(configured(tmp_path, name="parts"))
    shutil.rmtree(tmp_path / "runs/parts/checkpoints/step-00000004")
    run(configured(tmp_path, name="parts"), resume=True)
    first, second = (
        (tmp_path / f"runs/{name}/checkpoints/step-00000004/model-00000.safetensors").read_bytes()
        for name in ("whole", "parts")
    )
    assert first == second


@pytest.mark.parametrize("tower", [TINY_COCA["image"], {"type": "timm", "name": "test_resnet"}])
def test_a_reloaded_bundle_embeds_and_captions_bitwise_alike(
    tmp_path: Path, tower: dict[str, Any]
) -> None:
    model = coca_bundle(tmp_path / "b", image=tower)
    info = read_bundle_info(tmp_path / "b")
    assert (info.model_kind, info.dim) == ("coca", 16)
    loaded = load_bundle(tmp_path / "b")
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    texts = ["a red circle", "blue"]
    kept = Bundle(info=info, model=model)
    first, second = Encoder(kept), Encoder(loaded)
    assert np.array_equal(first.encode_images(PICTURES), second.encode_images(PICTURES))
    assert np.array_equal(first.encode_texts(texts), second.encode_texts(texts))
    sampling = NucleusSampling(p=0.5)
    found = Captioner(kept).caption(PICTURES, sampling, seed=3)
    assert found == Captioner(loaded).caption(PICTURES, sampling, seed=3)
    assert found != Captioner(loaded).caption(PICTURES, sampling, seed=4)


def test_equal_models_have_equal_fingerprints_and_others_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        coca_bundle(tmp_path / name, seed=seed)
    first, second, other = (read_bundle_info(tmp_path / name).fingerprint for name in "abc")
    assert first == second != other


def test_a_damaged_configuration_of_a_bundle_is_told(tmp_path: Path) -> None:
    coca_bundle(tmp_path / "b")
    (tmp_path / "b/coca_config.json").write_text("{}")
    with pytest.raises(BundleError, match="altered since export"):
        load_bundle(tmp_path / "b")
    (tmp_path / "b/coca_config.json").unlink()
    with pytest.raises(BundleError, match="incomplete, cannot read .*coca_config.json"):
        load_bundle(tmp_path / "b")


def test_plain_open_clip_refuses_the_bundle(tmp_path: Path) -> None:
    coca_bundle(tmp_path / "b")
    with pytest.raises((RuntimeError, FileNotFoundError, ValueError)):
        open_clip.create_model(f"local-dir:{tmp_path / 'b'}")


def test_captions_do_not_depend_on_the_batch_and_have_a_length(tmp_path: Path) -> None:
    coca_bundle(tmp_path / "b")
    whole = Captioner.load(tmp_path / "b").caption(PICTURES, GreedySearch())
    parts = Captioner(load_bundle(tmp_path / "b"), batch_size=3)
    assert parts.caption(PICTURES, GreedySearch()) == whole
    short = parts.caption(PICTURES, GreedySearch(), max_tokens=1)
    assert all(len(a) < len(b) for a, b in zip(short, whole, strict=True))
    assert parts.caption([]) == []


def test_a_dual_encoder_is_asked_for_no_captions(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "b")
    with pytest.raises(BundleError, match="a dual_encoder writes no captions"):
        Captioner.load(tmp_path / "b")


def test_the_verb_captions_files_and_names_what_is_none(tmp_path: Path) -> None:
    coca_bundle(tmp_path / "b")
    PICTURES[0].save(tmp_path / "x.png")
    (tmp_path / "y.png").write_text("no image")
    verb = [sys.executable, "-m", "vlm", "caption", str(tmp_path / "b"), "--search", "greedy"]
    done = subprocess.run([*verb, str(tmp_path / "x.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (expected,) = Captioner.load(tmp_path / "b").caption(PICTURES[:1], GreedySearch())
    assert done.stdout == f"{tmp_path / 'x.png'}: {expected}\n"
    done = subprocess.run([*verb, str(tmp_path / "y.png")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "y.png: cannot be read as an image" in done.stderr


@pytest.mark.parametrize("changes", [
    {"loss": [{"type": "clip"}]},
    {"model": {"dim": 16, "image": TINY_COCA["image"], "text": {"width": 32, "heads": 2}}},
])  # fmt: skip
def test_captions_are_told_by_a_coca_and_by_no_other(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="only a coca, is trained with the loss caption"):
        configured(tmp_path, **changes)
