"""CoCa: who sees whom, what has which shape, and that everything learns."""

from typing import Any

import open_clip
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.testing import assert_close

from tests.support import TINY_COCA
from vlm.distributed import World
from vlm.losses import LossTerm
from vlm.models import CoCa, CocaConfig, DualEncoder, DualEncoderConfig, ModelConfig, build_model
from vlm.models.caption_decoder import real_tokens
from vlm.train.objective import global_loss
from vlm.types import IGNORED_TOKEN

VOCAB, LENGTH = 50, 10
START, END = VOCAB - 2, VOCAB - 1
VARIANTS: dict[str, dict[str, Any]] = {
    "cascade": {"caption_queries": 6},
    "no pooler": {"caption_queries": 0},
    "timm": {"caption_queries": 6, "image": {"type": "timm", "name": "test_resnet"}},
    "timm tokens": {"caption_queries": 0, "image": {"type": "timm", "name": "test_vit"}},
}


def config(**changes: Any) -> CocaConfig:
    text = {**TINY_COCA["text"], "vocab_size": VOCAB}
    return CocaConfig.model_validate({**TINY_COCA, "text": text, **changes})


def build(*, image_size: int = 32, **changes: Any) -> CoCa:
    torch.manual_seed(0)
    model = CoCa(config(**changes), image_size=image_size, context_length=LENGTH)
    with torch.no_grad():  # fresh weights are too small to tell effects from rounding
        for parameter in model.text.parameters():
            parameter.mul_(5)
    return model.double().eval()


def images(count: int, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


def sequences() -> Tensor:
    """Captions of 3, 6 and 8 words; the id 0 inside the second is a word, not padding."""
    rows = torch.zeros(3, LENGTH, dtype=torch.int64)
    for row, words in zip(
        rows, ([5, 6, 7], [8, 0, 9, 9, 4, 3], [1, 2, 3, 4, 5, 6, 7, 8]), strict=True
    ):
        row[: len(words) + 2] = torch.tensor([START, *words, END])
    return rows


def logits(model: CoCa, token_ids: Tensor) -> Tensor:
    captions = model(images(len(token_ids)), token_ids).captions
    assert captions is not None
    return model.logits(captions.hidden)


@pytest.mark.parametrize("changed", range(LENGTH))
def test_a_token_changes_no_logits_before_it_and_all_at_and_after_it(changed: int) -> None:
    model, token_ids = build(), sequences()
    other = token_ids.clone()
    other[:, changed] = (other[:, changed] + 11) % START
    before, after = logits(model, token_ids), logits(model, other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert bool((before[:, changed:] != after[:, changed:]).any(dim=2).all())


def test_what_stands_in_the_padding_or_is_cut_off_it_changes_nothing() -> None:
    model, token_ids = build(), sequences()[:2]
    other = token_ids.clone()
    other[~real_tokens(token_ids)] = 17
    rows = model(images(2), token_ids)
    for changed in (other, token_ids[:, :8]):
        again = model(images(2), changed)
        assert_close(again.text, rows.text, rtol=0, atol=1e-12)
        assert_close(again.image, rows.image, rtol=0, atol=1e-12)
        real = again.captions.targets != IGNORED_TOKEN
        wide = torch.zeros_like(rows.captions.targets, dtype=torch.bool)
        wide[:, : real.shape[1]] = real
        assert_close(again.captions.hidden[real], rows.captions.hidden[wide], rtol=0, atol=1e-12)
        assert torch.equal(again.captions.targets[real], token_ids[:, 1:][wide])
    assert_close(model.encode_text(token_ids[:1, :5]), rows.text[:1], rtol=0, atol=1e-12)


def test_the_class_token_sees_every_real_token_and_no_token_sees_it() -> None:
    model, token_ids = build(), sequences()
    rows = model.encode_text(token_ids)
    for row, words in enumerate((3, 6, 8)):
        for position in range(1, words + 1):
            other = token_ids.clone()
            other[row, position] = 20
            difference = (model.encode_text(other)[row] - rows[row]).abs()
            assert bool((difference > 1e-9).any())
    before = logits(model, token_ids)
    with torch.no_grad():
        model.text.class_embedding.normal_()
    assert torch.equal(logits(model, token_ids), before)
    assert not torch.equal(model.encode_text(token_ids), rows)


def test_targets_are_the_next_tokens_with_the_end_mark_and_an_inner_zero() -> None:
    captions = build()(images(3), sequences()).captions
    assert captions.targets[0].tolist() == [5, 6, 7, END] + [IGNORED_TOKEN] * 5
    assert captions.targets[1].tolist() == [8, 0, 9, 9, 4, 3, END] + [IGNORED_TOKEN] * 2
    assert captions.targets[2].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, END]


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_and_parameters_have_their_shapes(name: str) -> None:
    model = build(**VARIANTS[name])
    output = model(images(3), sequences())
    assert output.image.shape == output.text.shape == (3, 16)
    assert_close(output.image.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert_close(output.text.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert output.captions.hidden.shape == (3, LENGTH - 1, 32)
    assert output.captions.vocabulary.shape == (VOCAB, 32)
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert shapes["log_logit_scale"] == (1,)
    assert shapes["contrastive_pooler.query_embedding"] == (1, 32)
    assert shapes["text.positional_embedding"] == (LENGTH, 32)
    assert shapes.get("caption_pooler.query_embedding") == (
        None if "no pooler" in name or name == "timm tokens" else (6, 32)
    )


def test_the_contrastive_pooler_reads_what_the_caption_pooler_returns() -> None:
    model = build(caption_queries=6)
    rows = model.image_rows(images(2))
    assert rows.shape == (2, 6, 32)
    assert model.caption_pooler is not None
    with torch.no_grad():
        before = model.encode_image(images(2))
        model.caption_pooler.out_norm.weight.mul_(-1)
        assert not torch.allclose(model.encode_image(images(2)), before)
    assert build(caption_queries=0).image_rows(images(2)).shape == (2, 16, 32)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = build(**VARIANTS[name], init_logit_bias=-3.0).train()
    with torch.no_grad():
        for parameter in model.parameters():  # residual branches that timm starts at zero
            if not parameter.any():
                parameter.fill_(0.1)
    trees = [{"type": "clip"}, {"type": "siglip"}, {"type": "caption", "weight": 2.0}]
    terms = [TypeAdapter(LossTerm).validate_python(tree) for tree in trees]
    output = model(images(3), sequences())
    global_loss(output, torch.arange(3), terms, progress=0.0, world=World()).total.backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_the_sum_of_clip_and_caption_is_open_clips_coca_loss_on_the_same_logits() -> None:
    model, token_ids = build(), sequences()
    token_ids[1, 2] = 30  # open_clip takes every 0 for padding
    output = model(images(3), token_ids)
    trees = [{"type": "clip"}, {"type": "caption", "weight": 2.0}]
    terms = [TypeAdapter(LossTerm).validate_python(tree) for tree in trees]
    ours = global_loss(output, torch.arange(3), terms, progress=0.0, world=World())
    theirs = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(
        output.image, output.text, model.logits(output.captions.hidden), token_ids[:, 1:],
        output.logit_scale,
    )  # fmt: skip
    assert_close(ours.total.detach(), sum(theirs).detach(), rtol=1e-6, atol=1e-6, check_dtype=False)


def test_patch_dropout_drops_in_training_alone() -> None:
    model = build(image={**TINY_COCA["image"], "patch_dropout": 0.5}, caption_queries=0)
    assert model.image_rows(images(2)).shape[1] == 16
    assert model.train().image_rows(images(2)).shape[1] == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"caption_queries": 1}, "starves the decoder"),
        ({"pooler_heads": 5}, "text.width=32 does not divide over pooler_heads=5"),
        ({"text": {"width": 30, "heads": 4}}, "text.width=30 does not divide over text.heads=4"),
    ],
)
def test_sizes_that_do_not_fit_are_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**changes)


def test_an_image_that_is_no_whole_number_of_patches_is_told() -> None:
    with pytest.raises(ValueError, match="images of 30 px are no whole number of 8 px"):
        build(image_size=30)


def test_a_model_section_without_a_type_is_a_dual_encoder() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ModelConfig)
    tower = {"type": "vit", "width": 32, "layers": 1, "head_width": 16, "patch_size": 8}
    text = {"width": 32, "layers": 1, "heads": 2}
    found = adapter.validate_python({"dim": 16, "image": tower, "text": text})
    assert isinstance(found, DualEncoderConfig)
    assert isinstance(build_model(found, image_size=32, context_length=8), DualEncoder)
    found = adapter.validate_python({**TINY_COCA, "type": "coca"})
    assert isinstance(build_model(found, image_size=32, context_length=8), CoCa)
