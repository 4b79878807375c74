"""From a model of open_clip, and back: the same names, the same embeddings."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP, convert_to_custom_text_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from tests.support import TINY_COCA, TINY_MODEL
from vlm.errors import ConfigError
from vlm.inference import load_bundle, save_bundle
from vlm.models import (
    CoCa,
    CocaConfig,
    DualEncoder,
    DualEncoderConfig,
    build_model,
    load_initial_weights,
)
from vlm.models.positions import resize_grid
from vlm.preprocess import ImageConfig, TokenizerConfig, build_tokenizer

TEXTS = ["a red circle", "something blue and square !", "x"]
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
SIGLIP: dict[str, Any] = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none",
    },
    "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
}  # fmt: skip
SIGLIP["embed_dim"] = 96  # the width of timm's test_vit3
MODELS: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "quickgelu": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "resnet": {"embed_dim": 16, "vision_cfg": RESNET, "text_cfg": TEXT},
    "siglip": SIGLIP,
}


def written(folder: Path, config: dict[str, Any], **preprocess: Any) -> str:
    """A folder as open_clip writes it, of a model with random weights."""
    folder.mkdir()
    tree = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(tree))
    torch.manual_seed(3)
    model = opened(f"local-dir:{folder}", config["vision_cfg"]["image_size"], load_weights=False)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def opened(name: str, size: int = 32, **options: Any) -> Any:
    return open_clip.create_model(name, force_image_size=size, **options).eval()


def started(size: int = 32, context_length: int = 12, **changes: Any) -> Any:
    config = DualEncoderConfig.model_validate(changes)
    model = build_model(config, image_size=size, context_length=context_length)
    assert isinstance(model, DualEncoder)
    load_initial_weights(model, config, image=ImageConfig(size=size))
    return model.eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def ids(context_length: int = 12) -> Tensor:
    return build_tokenizer(TokenizerConfig(context_length=context_length))(TEXTS)


@torch.no_grad()
def embeddings(model: Any, size: int = 32) -> tuple[Tensor, Tensor]:
    if isinstance(model, DualEncoder):
        return model.encode_image(images(size)), model.encode_text(ids())
    return model.encode_image(images(size), normalize=True), model.encode_text(
        ids(), normalize=True
    )


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_open_clips_when_a_model_starts_and_when_it_leaves(
    name: str, tmp_path: Path
) -> None:
    source = written(tmp_path / "theirs", MODELS[name])
    # open_clip loads a timm model's weights before it resizes them, so only at their own size.
    size = MODELS[name]["vision_cfg"]["image_size"]
    theirs = opened(source, size)
    bias = -3.0 if name == "siglip" else None
    config = DualEncoderConfig(start=source, init_logit_bias=bias)
    model = started(size, start=source, init_logit_bias=bias)
    for ours, expected in zip(embeddings(model, size), embeddings(theirs, size), strict=True):
        assert_close(ours, expected, rtol=0, atol=1e-5)
    assert_close(model.log_logit_scale.detach()[0], theirs.logit_scale.detach())
    if name == "siglip":
        assert model.logit_bias is not None
        assert model.logit_bias.tolist() == [-10.0]  # the checkpoint's, not the fresh one
    with torch.no_grad():  # as if trained on
        for parameter in model.parameters():
            parameter.mul_(1.01)
    save_bundle(
        tmp_path / "bundle", model, name="back", image=ImageConfig(size=size),
        open_clip_config=config.open_clip_config(image_size=size, context_length=12),
        tokenizer=TokenizerConfig(context_length=12),
    )  # fmt: skip
    back = opened(f"local-dir:{tmp_path / 'bundle'}", size)
    reloaded = load_bundle(tmp_path / "bundle").model
    for ours, loaded, expected in zip(
        *(embeddings(found, size) for found in (model, reloaded, back)), strict=True
    ):
        assert_close(ours, expected, rtol=0, atol=1e-5)
        assert torch.equal(ours, loaded)
    # A bundle is such a folder too.
    again = started(size, start=str(tmp_path / "bundle"), init_logit_bias=bias)
    assert torch.equal(embeddings(again, size)[0], embeddings(model, size)[0])


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-B-16-SigLIP", "RN50"])
def test_real_models_have_our_names_and_shapes(name: str) -> None:
    config = DualEncoderConfig(start=name)
    theirs_config = open_clip.get_model_config(name)
    custom = theirs_config.pop("custom_text", False)
    size = theirs_config["vision_cfg"]["image_size"]
    length = theirs_config["text_cfg"]["context_length"]
    if custom:
        config = DualEncoderConfig(start=name, init_logit_bias=-10)
    with torch.device("meta"):
        ours = DualEncoder(config.open_clip_config(image_size=size, context_length=length))
        theirs = (CustomTextCLIP if custom else open_clip.model.CLIP)(**theirs_config)
    expected = convert_to_custom_text_state_dict(theirs.state_dict())
    found = ours.open_clip_state()
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in expected.items()
    }


@pytest.mark.parametrize("name", ["clip", "resnet", "siglip"])
def test_another_resolution_resizes_positions_as_open_clip_does(name: str, tmp_path: Path) -> None:
    source = written(tmp_path / "theirs", MODELS[name])
    bias = -10.0 if name == "siglip" else None
    model = started(start=source, size=64, init_logit_bias=bias)
    if name != "siglip":  # open_clip resizes neither a timm model's, nor a ResNet's whose names
        expected = opened(source, load_weights=False, size=64)
        state = open_clip.factory.load_state_dict(tmp_path / "theirs/open_clip_model.safetensors")
        key = "visual.positional_embedding"
        if key in state:
            open_clip.model.resize_pos_embed(state, expected)
            assert_close(model.image.positional_embedding, state[key], rtol=0, atol=1e-6)
    assert torch.isfinite(embeddings(model, 64)[0]).all()


def test_a_grid_keeps_what_is_no_place_and_a_constant_stays_one() -> None:
    rows = torch.cat([torch.full((1, 2), 7.0), torch.ones(9, 2)])
    resized = resize_grid(rows, 26, extra=1)
    assert torch.equal(resized[0], rows[0])
    assert_close(resized[1:], torch.ones(25, 2))
    assert_close(resize_grid(rows, 10, extra=1), rows)
    with pytest.raises(ValueError, match="no square grids"):
        resize_grid(rows, 12, extra=1)


def test_another_context_length_cuts_positions_or_goes_on_with_fresh_ones(tmp_path: Path) -> None:
    source = written(tmp_path / "theirs", MODELS["clip"])
    theirs = opened(source).positional_embedding
    shorter, longer = (started(start=source, context_length=n) for n in (8, 20))
    assert torch.equal(shorter.text.positional_embedding, theirs[:8])
    assert torch.equal(longer.text.positional_embedding[:12], theirs)
    assert 0 < float(longer.text.positional_embedding[12:].detach().std()) < 0.05


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    source = written(tmp_path / "theirs", MODELS["clip"], mean=[0.5, 0.5, 0.5])
    with pytest.raises(ConfigError, match=r"set image.mean=\[0.5, 0.5, 0.5\]"):
        started(start=source)
    (tmp_path / "theirs/open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODELS["clip"]})
    )
    with pytest.raises(ConfigError, match="weights of another model"):
        started(start=source, **TINY_MODEL)
    with pytest.raises(ConfigError, match="has 16; leave dim out"):
        started(start=source, dim=32)
    with pytest.raises(ConfigError, match="ViT-B-32: no weights here; name a checkpoint"):
        started(start="ViT-B-32", **TINY_MODEL)
    (tmp_path / "theirs/open_clip_model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ConfigError, match="no weights that can be read safely"):
        started(start=source)


def test_a_coca_starts_from_a_bundle_at_another_resolution_and_length(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = CocaConfig.model_validate(TINY_COCA)
    donor = CoCa(config, image_size=32, context_length=8).eval()
    save_bundle(
        tmp_path / "b", donor, name="coca", image=ImageConfig(size=32),
        tokenizer=TokenizerConfig(context_length=8),
    )  # fmt: skip
    config = config.model_copy(update={"start": tmp_path / "b"})
    for size, length in ((32, 8), (48, 12)):
        model = build_model(config, image_size=size, context_length=length)
        assert isinstance(model, CoCa)
        load_initial_weights(model, config, image=ImageConfig(size=size))
        model.eval()
        with torch.no_grad():  # a short caption does not care how much longer it might be
            assert_close(model.encode_text(ids(8)), donor.encode_text(ids(8)))
            if size == 32:
                assert torch.equal(model.encode_image(images()), donor.encode_image(images()))
    wrong = config.model_copy(update={"start": tmp_path})
    with pytest.raises(ConfigError, match="no bundle of a CoCa"):
        load_initial_weights(model, wrong, image=ImageConfig(size=32))
