"""Towers that others have made: what they start from, and that they leave as open_clip has them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from tests.support import TINY_COCA, TINY_MODEL
from vlm.config import validate_config
from vlm.errors import ConfigError
from vlm.inference import Bundle, Encoder, load_bundle, save_bundle
from vlm.models import (
    CocaConfig,
    DualEncoder,
    DualEncoderConfig,
    build_model,
    load_initial_weights,
)
from vlm.preprocess import (
    HuggingFaceTokenizerConfig,
    ImageConfig,
    TokenizerConfig,
    build_tokenizer,
    tokenizer_digest,
    tokenizer_vocab_size,
    trim_padding,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "!"]
PAD, CLS, SEP = 0, 2, 3
TEXTS = ["a red circle", "a blue square", "a red red red red red red circle !"]
OPEN_CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a hub would give it: a BERT of two layers, and its WordPiece tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(5)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=24,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as open_clip writes it: a small CLIP with text weights on its top level."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(6)
    preprocess = {"mean": list(ImageConfig().mean), "std": list(ImageConfig().std)}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": OPEN_CLIP_CONFIG, "preprocess_cfg": preprocess})
    )
    model = open_clip.model.CLIP(**OPEN_CLIP_CONFIG)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def built(**changes: Any) -> tuple[Any, DualEncoderConfig]:
    config = DualEncoderConfig.model_validate({**TINY_MODEL, **changes})
    model = build_model(config, image_size=32, context_length=12)
    assert isinstance(model, DualEncoder)
    load_initial_weights(model, config, image=ImageConfig(size=32))
    return model.eval(), config


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_embeddings_of_a_view_are_a_tensor_of_their_own_and_fsdp_has_nothing_to_warn_of() -> None:
    model, _ = built()
    output = model(images(), torch.ones(2, 12, dtype=torch.int64))
    assert not output.image._is_view()
    twice = model(images(), torch.ones(2, 12, dtype=torch.int64), images())
    assert_close(output.image, twice.image, atol=1e-6, rtol=0)
    assert not any(rows._is_view() for rows in (twice.image, *twice.more_images))


def tokens(bert: Path, **changes: Any) -> HuggingFaceTokenizerConfig:
    return HuggingFaceTokenizerConfig(source=str(bert), context_length=8, **changes)


def test_ids_are_those_of_open_clips_tokenizer_and_a_cut_caption_keeps_its_end(bert: Path) -> None:
    ids = build_tokenizer(tokens(bert))(TEXTS)
    theirs = open_clip.tokenizer.HFTokenizer(str(bert), context_length=8)(TEXTS)
    assert torch.equal(ids, theirs)
    assert ids[0].tolist() == [CLS, 5, 6, 8, SEP, PAD, PAD, PAD]
    assert ids[2, -1] == SEP
    assert tokenizer_vocab_size(tokens(bert)) == len(WORDS)
    assert tokenizer_digest(tokens(bert)) != tokenizer_digest(tokens(bert, clean="lower"))
    assert build_tokenizer(tokens(bert))([]).shape == (0, 8)


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer in this folder"):
        build_tokenizer(HuggingFaceTokenizerConfig(source=str(tmp_path)))


@pytest.mark.parametrize("pooling", ["cls", "cls_pooler", "mean"])
def test_a_text_encoder_starts_from_its_weights_and_masks_its_padding(
    bert: Path, pooling: str
) -> None:
    from transformers import BertModel

    model, _ = built(text={"type": "huggingface", "name": str(bert), "pooling": pooling})
    ids = build_tokenizer(tokens(bert))(TEXTS[:2])
    theirs: Any = BertModel.from_pretrained(bert)  # in evaluation mode
    said = theirs(ids, attention_mask=(ids != PAD).long())
    expected = {
        "cls": said.last_hidden_state[:, 0],
        "cls_pooler": said.pooler_output,
        "mean": said.last_hidden_state[:, :5].mean(dim=1),
    }[pooling]
    expected = torch.nn.functional.normalize(expected @ model.text.proj.weight.T, dim=1)
    assert trim_padding(ids).shape == (2, 5)
    assert_close(model.encode_text(ids), expected, rtol=1e-5, atol=1e-6)
    assert_close(model.encode_text(trim_padding(ids)), expected, rtol=1e-5, atol=1e-6)


def test_a_caption_longer_than_a_text_encoder_can_read_is_told(bert: Path) -> None:
    config = DualEncoderConfig.model_validate(
        {**TINY_MODEL, "text": {"type": "huggingface", "name": str(bert)}}
    )
    with pytest.raises(ConfigError, match="context_length=25: .* knows 24 positions"):
        build_model(config, image_size=32, context_length=25)


def test_a_bundle_of_a_text_encoder_needs_nothing_beside_it(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    for file in bert.iterdir():
        (gone / file.name).write_bytes(file.read_bytes())
    prints = []
    kept: dict[str, torch.Tensor] | None = None
    for folder, source in (("a", gone), ("b", bert)):
        model, config = built(text={"type": "huggingface", "name": str(source)})
        if kept is not None:
            model.load_state_dict(kept)
        kept = model.state_dict()
        info = save_bundle(
            tmp_path / folder, model, name="bert", image=ImageConfig(size=32),
            open_clip_config=config.open_clip_config(image_size=32, context_length=8),
            tokenizer=tokens(source),
        )  # fmt: skip
        prints.append(info.fingerprint)
    assert prints[0] == prints[1]
    before = Encoder(Bundle(info=info, model=model)).encode_texts(TEXTS)
    for file in gone.iterdir():
        file.unlink()
    (tmp_path / "a").rename(tmp_path / "moved")
    bundle = load_bundle(tmp_path / "moved")
    assert np.array_equal(Encoder(bundle).encode_texts(TEXTS), before)
    # open_clip takes a relative name as from where it runs.
    monkeypatch.chdir(tmp_path / "moved")
    theirs = open_clip.create_model("local-dir:.").eval()
    ids = open_clip.get_tokenizer("local-dir:.", context_length=8)(TEXTS)
    with torch.no_grad():
        assert_close(theirs.encode_text(ids, normalize=True), torch.from_numpy(before))


def test_a_tower_of_open_clip_starts_from_its_weights(clip: Path) -> None:
    tower = {"type": "open_clip", "name": f"local-dir:{clip}", "pretrained": True}
    theirs = open_clip.create_model(f"local-dir:{clip}").eval()
    ids = build_tokenizer(TokenizerConfig(context_length=12))(TEXTS)
    model, _ = built(image=tower, text=tower)
    with torch.no_grad():
        assert_close(model.encode_image(images()), theirs.encode_image(images(), normalize=True))
        assert_close(model.encode_text(ids), theirs.encode_text(ids, normalize=True))
    narrow, _ = built(image=tower, text=tower, dim=8)
    assert narrow.encode_image(images()).shape == (2, 8)
    assert torch.equal(narrow.image.conv1.weight, theirs.visual.conv1.weight)
    other, _ = built(image={**tower, "pretrained": False}, text=tower)
    assert not torch.equal(other.image.conv1.weight, theirs.visual.conv1.weight)


def test_two_activations_in_one_model_are_told(clip: Path) -> None:
    config = DualEncoderConfig.model_validate(
        {**TINY_MODEL, "image": {"type": "open_clip", "name": f"local-dir:{clip}"}}
    )
    with pytest.raises(ConfigError, match="which open_clip cannot express"):
        config.open_clip_config(image_size=32, context_length=12)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ViT-B-99", "open_clip has no architecture 'ViT-B-99'"),
        ("ViT-B-32/nonsense", "has no checkpoint 'nonsense' of it; there are: .*laion2b_s34b_b79k"),
        ("local-dir:nowhere", "no open_clip model"),
        ("coca_ViT-B-32", "a CoCa of open_clip"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(name: str, said: str) -> None:
    config = DualEncoderConfig(start=name)
    with pytest.raises(ConfigError, match=said):
        config.open_clip_config(image_size=32, context_length=12)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_timm_tower_starts_from_a_file_of_weights(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(7)
    donor: Any = timm.create_model("test_vit", num_classes=10)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(donor.state_dict(), path)
    else:
        save_file(donor.state_dict(), path)
    tower = {"type": "timm", "name": "test_vit", "pool": "token", "weights": str(path)}
    model, _ = built(image=tower)
    state = model.image.trunk.state_dict()
    assert torch.equal(state["blocks.0.attn.qkv.weight"], donor.blocks[0].attn.qkv.weight)
    assert state["pos_embed"].shape == (1, 1 + 4, 64)  # 32 px in patches of 16
    config = CocaConfig.model_validate({**TINY_COCA, "image": {**tower, "pool": "avg"}})
    coca: Any = build_model(config, image_size=32, context_length=8)
    load_initial_weights(coca, config, image=ImageConfig(size=32))
    state = coca.image.trunk.state_dict()
    assert torch.equal(state["blocks.0.attn.qkv.weight"], donor.blocks[0].attn.qkv.weight)
    assert "weights" not in coca.architecture["config"]["image"]


def test_weights_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "weights.pth")
    tower = {"type": "timm", "name": "test_vit", "weights": str(tmp_path / "weights.pth")}
    with pytest.raises(ConfigError, match="timm test_vit: no weights that fit from"):
        built(image=tower)
    with pytest.raises(ConfigError, match="no such file"):
        built(image={**tower, "weights": str(tmp_path / "none.pth")})


def test_a_timm_tower_without_projection_needs_its_own_width() -> None:
    tower = {"type": "timm", "name": "test_vit", "pool": "avg", "projection": "none"}
    with pytest.raises(ConfigError, match="it must be the width of test_vit, 64"):
        built(image=tower)
    model, _ = built(image=tower, dim=64)
    assert model.encode_image(images()).shape == (2, 64)


def test_a_vision_model_of_one_size_reads_the_configured_size() -> None:
    tower = {"type": "timm", "name": "vit_tiny_patch16_224", "patch_dropout": 0.5}
    with torch.device("meta"):
        config = DualEncoderConfig.model_validate({**TINY_MODEL, "image": tower})
        model: Any = build_model(config, image_size=48, context_length=12)
        assert model.train().encode_image(torch.empty(2, 3, 48, 48)).shape == (2, 16)
    assert tuple(model.image.trunk.pos_embed.shape) == (1, 1 + 9, 192)


def test_a_text_encoder_recomputes_its_blocks_to_the_same_gradients(bert: Path) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        text = {"type": "huggingface", "name": str(bert)}
        model, _ = built(text=text, gradient_checkpointing=recompute)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        ids = build_tokenizer(tokens(bert))(TEXTS)
        model.train().encode_text(ids)[:, 0].sum().backward()
        gradients.append({n: p.grad for n, p in model.text.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("tower", "said"),
    [
        ({"image": {"type": "vit", "width": 32, "layers": 2}}, "width=32 .* head_width=64"),
        ({"image": {"type": "vit", "width": 50, "head_width": 16}}, "width=50 .* head_width=16"),
        ({"text": {"type": "transformer", "width": 32, "heads": 3}}, "width=32 .* heads=3"),
    ],
)
def test_a_width_that_its_heads_cannot_share_is_told(tower: dict[str, Any], said: str) -> None:
    """It was a traceback of torch."""
    with pytest.raises(ConfigError, match=said):
        validate_config(DualEncoderConfig, tower, source="x.yaml")
