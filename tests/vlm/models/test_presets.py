"""Presets of configs/train have their papers' sizes, and run small by the overrides they name."""

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from tests.support import drawn_samples, write_dataset
from vlm.config import load_config
from vlm.distributed import World
from vlm.models import DualEncoder, build_model
from vlm.train import TrainConfig, train
from vlm.train.export import export_run

CONFIGS = Path(__file__).parents[3] / "configs/train"


def preset(name: str, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, CONFIGS / f"{name}.yaml", list(overrides))


def on_meta(config: TrainConfig) -> Any:
    with torch.device("meta"):
        return build_model(
            config.model,
            image_size=config.image.size,
            context_length=config.tokenizer.context_length,
        )


@pytest.mark.parametrize(
    ("name", "paper", "ours"), [("coca_base", 383e6, 367e6), ("coca_large", 787e6, 768e6)]
)
def test_cocas_have_the_parameters_of_the_paper(name: str, paper: float, ours: float) -> None:
    """Within 2% at the paper's vocabulary of 64,000, which we keep two matrices of."""
    counts = [
        sum(parameter.numel() for parameter in on_meta(config).parameters())
        for config in (preset(name, "model.text.vocab_size=64000"), preset(name))
    ]
    assert counts == [pytest.approx(paper, rel=0.02), pytest.approx(ours, rel=0.002)]


def test_siglip_has_the_names_and_shapes_of_open_clips() -> None:
    config = preset("siglip_b16")
    theirs = open_clip.get_model_config("ViT-B-16-SigLIP")
    theirs.pop("custom_text")
    ours = on_meta(config)
    assert isinstance(ours, DualEncoder)
    with torch.device("meta"):
        expected = open_clip.model.CustomTextCLIP(**theirs).state_dict()
    assert {name: tensor.shape for name, tensor in ours.open_clip_state().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert getattr(ours.image.trunk, "cls_token", ...) is None


def bert(folder: Path) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir()
    words = sorted({word for sample in drawn_samples(16) for word in sample.text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    folder.mkdir()
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    state = open_clip.model.CLIP(**config).state_dict()
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    return folder


def documented(name: str) -> list[str]:
    """The overrides of the comment that begins with `Small:`."""
    comment = re.search(
        r"^# Small: (.*(?:\n#  +.*)*)", (CONFIGS / f"{name}.yaml").read_text(), re.M
    )
    assert comment
    text = re.sub(r"\n# +", " ", comment[1])
    return re.findall(r"[\w.]+=(?:\{.*?\}|\S+)", text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["align_b7_bert", "siglip_b16", "lit_b32_bert", "coca_base", "coca_large"]
)
def test_every_preset_trains_and_leaves_by_the_overrides_it_names(
    name: str, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "shards", 16)
    places = {"FOLDER": str(bert(tmp_path / "bert")), "CLIP": str(clip(tmp_path / "clip"))}
    small = documented(name)
    for word, place in places.items():
        small = [re.sub(rf"\b{word}\b", place, override) for override in small]
    config = preset(name, *small, f"output={tmp_path}", f"data.shards={tmp_path / 'shards'}",
                    "log_every=1", "engine={type: torch, precision: fp32}")  # fmt: skip
    assert train(config, world=World(), console=Console(quiet=True), resume=False).finished
    first = json.loads((config.run_folder / "metrics.jsonl").read_text().splitlines()[0])
    begins = {"align_b7_bert": 1.0, "siglip_b16": 10.0}.get(name, 1 / 0.07)
    assert first["logit_scale"] == pytest.approx(begins, rel=1e-3)
    info = export_run(config.run_folder, tmp_path / "bundle", console=Console(quiet=True))
    assert info.dim == config.model.dim
