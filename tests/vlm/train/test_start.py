"""A run that goes on from another model: what is locked stays, what it began with may go."""

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.support import TINY_MODEL, write_dataset
from vlm.config import validate_config
from vlm.distributed import World
from vlm.errors import ConfigError
from vlm.train import TrainConfig, train
from vlm.train.export import export_run

CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def configured(tmp_path: Path, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "name": "run", "output": str(tmp_path / "runs"), "steps": 4, "global_batch": 8,
        "image": {"size": 32}, "tokenizer": {"context_length": 12},
        "data": {"shards": str(tmp_path / "shards")},
        "model": {"start": f"local-dir:{tmp_path / 'clip'}", "freeze": {"parameters": ["image.*"]}},
        "loss": [{"type": "clip"}],
        "optim": {"type": "adamw", "lr": 1e-2},
        "engine": {"type": "torch", "precision": "fp32"},
        "checkpoint_every": 2,
    }  # fmt: skip
    return validate_config(TrainConfig, {**base, **changes}, source="test")


def write_clip(folder: Path) -> None:
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
    torch.manual_seed(3)
    state = open_clip.model.CLIP(**CLIP).state_dict()
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")


def run(config: TrainConfig, *, resume: bool = False) -> bytes:
    train(config, world=World(), console=Console(quiet=True), resume=resume)
    return (config.run_folder / "checkpoints/step-00000004/model-00000.safetensors").read_bytes()


def test_a_locked_tower_leaves_as_it_came_and_a_resumed_run_needs_no_weights_but_its_own(
    tmp_path: Path,
) -> None:
    write_dataset(tmp_path / "shards", 16)
    write_clip(tmp_path / "clip")
    config = configured(tmp_path)
    whole = run(config)
    before = load_file(tmp_path / "clip/model.safetensors")
    (tmp_path / "clip/model.safetensors").unlink()
    shutil.rmtree(config.run_folder / "checkpoints/step-00000004")
    assert run(config, resume=True) == whole
    export_run(config.run_folder, tmp_path / "bundle", console=Console(quiet=True))
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'bundle'}").state_dict()
    for name, tensor in before.items():
        if name.startswith("visual."):
            assert torch.equal(theirs[name], tensor)
    moved = theirs["text.token_embedding.weight"] - before["token_embedding.weight"]
    assert float(moved.abs().max()) > 1e-3


def test_a_tokenizer_of_more_ids_than_the_tower_knows_is_told(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 16)
    text = {**TINY_MODEL["text"], "vocab_size": 1000}
    config = configured(tmp_path, model={**TINY_MODEL, "text": text})
    with pytest.raises(ConfigError, match="has 49408 ids, and the text tower knows 1000"):
        run(config)
    assert not (tmp_path / "runs/run/checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"dim": 16}}, "give the image tower, or a model to start from"),
        ({"model": {**TINY_MODEL, "text": {"type": "huggingface", "name": "bert"}}},
         "needs the tokenizer it was made with"),
        ({"model": TINY_MODEL, "tokenizer": {"type": "huggingface", "source": "x"}},
         "finds a caption's end by the highest id"),
        ({"model": {**TINY_MODEL, "text": {**TINY_MODEL["text"], "pool": "first"}}},
         "has seen nothing"),
        ({"model": {**TINY_MODEL, "image": {"type": "open_clip"}}}, "image.open_clip.name: this"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_are_told(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(tmp_path, **changes)
