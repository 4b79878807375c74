"""The caption loss against the whole matrix of logits, and what it keeps for the backward pass."""

from collections.abc import Callable

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.support import unit_rows
from vlm.losses import caption_loss, total_loss
from vlm.losses.caption import CaptionTerm, caption_loss_sum, caption_sum
from vlm.losses.contrastive import clip_loss
from vlm.types import IGNORED_TOKEN, CaptionRows, CaptionSum, Features


def inputs(rows: int, vocab: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    vocabulary = torch.randn(vocab, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    return hidden.requires_grad_(), vocabulary.requires_grad_(), targets


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 23),
    vocab=st.integers(1, 30),
    chunk=st.integers(1, 25),
    ignored=st.integers(0, 22),
)
def test_chunks_give_the_cross_entropy_of_the_whole_and_its_gradients(
    rows: int, vocab: int, chunk: int, ignored: int
) -> None:
    hidden, vocabulary, targets = inputs(rows, vocab)
    targets[torch.arange(rows) % 23 < min(ignored, rows - 1)] = IGNORED_TOKEN
    found = caption_loss(hidden, vocabulary, targets, chunk=chunk)
    expected = F.cross_entropy(hidden @ vocabulary.T, targets, ignore_index=IGNORED_TOKEN)
    assert_close(found, expected, atol=1e-9, rtol=1e-9)
    ours = torch.autograd.grad(3 * found, (hidden, vocabulary))
    theirs = torch.autograd.grad(3 * expected, (hidden, vocabulary))
    assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_a_decoder_that_knows_nothing_pays_the_log_of_the_vocabulary() -> None:
    hidden, vocabulary, targets = inputs(9, 17)
    value = caption_loss(torch.zeros_like(hidden), vocabulary, targets)
    assert_close(value, torch.tensor(17.0, dtype=torch.float64).log())


def test_states_of_ignored_targets_are_never_looked_at() -> None:
    hidden, vocabulary, targets = inputs(8, 11)
    targets[5:] = IGNORED_TOKEN
    poisoned = hidden.detach().clone()
    poisoned[5:] = torch.nan
    poisoned.requires_grad_()
    value = caption_loss(poisoned, vocabulary, targets)
    assert_close(value, caption_loss(hidden[:5], vocabulary, targets[:5]))
    (gradient,) = torch.autograd.grad(value, poisoned)
    assert torch.equal(gradient[5:], torch.zeros_like(gradient[5:]))


def test_captions_without_tokens_cost_nothing_and_send_zeros_back() -> None:
    hidden, vocabulary, targets = inputs(4, 5)
    value = caption_loss(hidden, vocabulary, torch.full_like(targets, IGNORED_TOKEN))
    assert float(value.detach()) == 0.0
    for gradient in torch.autograd.grad(value, (hidden, vocabulary)):
        assert not gradient.any()


def test_huge_logits_stay_finite() -> None:
    hidden, vocabulary, targets = inputs(5, 7)
    value = caption_loss(1e4 * hidden, vocabulary, targets)
    assert torch.isfinite(value)
    for gradient in torch.autograd.grad(value, (hidden, vocabulary)):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_the_other_the_same(frozen: int) -> None:
    hidden, vocabulary, targets = inputs(6, 9)
    expected = torch.autograd.grad(caption_loss(hidden, vocabulary, targets), (hidden, vocabulary))
    given = [hidden, vocabulary]
    given[frozen] = given[frozen].detach()
    value = caption_loss(given[0], given[1], targets)
    (found,) = torch.autograd.grad(value, given[1 - frozen])
    assert_close(found, expected[1 - frozen])


def test_bfloat16_states_are_summed_in_float32_under_autocast_too() -> None:
    hidden, vocabulary, targets = inputs(40, 50)
    rough = hidden.detach().bfloat16().requires_grad_()
    matrix = vocabulary.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = caption_loss(rough, matrix, targets, chunk=7)
    assert value.dtype == torch.float32
    assert_close(value, F.cross_entropy(rough.float() @ matrix.T, targets), rtol=1e-5, atol=1e-5)
    value.backward()
    assert rough.grad is not None
    assert rough.grad.dtype == torch.bfloat16


def test_a_chunk_of_nothing_is_refused() -> None:
    hidden, vocabulary, targets = inputs(3, 4)
    with pytest.raises(ValueError, match="got chunk=0"):
        caption_loss_sum(hidden, vocabulary, targets, chunk=0)


def saved_bytes(run: Callable[[], Tensor]) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = run()
    assert value.requires_grad
    return sum(kept.values())


def test_bytes_kept_are_those_of_the_inputs_whatever_the_vocabulary_times_the_rows() -> None:
    width, beside = 6, 128  # the count of tokens and the division keep a few bytes
    for rows, vocab in ((64, 100), (128, 100), (64, 800), (512, 3200)):
        hidden, vocabulary, targets = inputs(rows, vocab)
        kept = saved_bytes(lambda: caption_loss(hidden, vocabulary, targets, chunk=16))  # noqa: B023
        gradients = 8 * width * (rows + vocab)
        indices = 8 * rows + rows  # which rows count
        assert gradients <= kept <= gradients + indices + beside
        whole = saved_bytes(lambda: F.cross_entropy(hidden @ vocabulary.T, targets))  # noqa: B023
        assert whole >= 8 * rows * vocab


def features(captions: CaptionSum | None) -> Features:
    return Features(
        image=unit_rows(4, 6), text=unit_rows(4, 6, seed=1),
        logit_scale=torch.tensor([10.0], dtype=torch.float64), logit_bias=None,
        group_ids=torch.arange(4), captions=captions,
    )  # fmt: skip


def test_the_sum_with_clip_is_open_clips_coca_loss() -> None:
    hidden, vocabulary, _ = inputs(4 * 7, 13)
    labels = torch.randint(1, 13, (4, 7), generator=torch.Generator().manual_seed(3))
    labels[1, 4:], labels[2, 6:] = 0, 0
    rows = CaptionRows(
        hidden=hidden.reshape(4, 7, 6),
        targets=labels.masked_fill(labels == 0, IGNORED_TOKEN),
        vocabulary=vocabulary,
    )
    given = features(caption_sum(rows))
    value, statistics = CaptionTerm(weight=2.0).compute(given)
    contrastive = clip_loss(given.image, given.text, given.logit_scale)
    theirs = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(
        given.image, given.text, rows.hidden @ vocabulary.T, labels, given.logit_scale
    )
    assert_close((contrastive, 2 * value), theirs)
    assert_close(statistics["perplexity"], value.exp())
    total = total_loss([CaptionTerm(weight=2.0)], given, progress=0.0)
    assert_close(total.total, theirs[1])


def test_a_model_without_a_decoder_is_named() -> None:
    with pytest.raises(ValueError, match="model.type: coca"):
        CaptionTerm().compute(features(None))
