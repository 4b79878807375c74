"""The last block for one position: the rows, gradients and names of the whole block."""

from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from vlm.models import DualEncoder
from vlm.models.last_block import LastBlock

VISION = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 2, "layers": 3}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "end mark": ({}, {}),
    "last, not causal": ({}, {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}),
    "last, causal": ({}, {"pool_type": "last"}),
    "first": ({}, {"no_causal_mask": True, "pool_type": "first"}),
    "layer scale": ({"ls_init_value": 0.5}, {"ls_init_value": 0.5}),
}  # fmt: skip
NEEDS_ALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mean": ({"pool_type": "avg"}, {"embed_cls": True, "output_tokens": True}),
    "pooler": ({"attentional_pool": True, "attn_pooler_heads": 2}, {"block_type": "custom"}),
}


def configuration(vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    return {"embed_dim": 16, "vision_cfg": VISION | vision, "text_cfg": TEXT | text}


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def both(vision: dict[str, Any], text: dict[str, Any]) -> tuple[Any, Any]:
    """Ours, and open_clip's with its weights."""
    theirs = open_clip.model.CustomTextCLIP(**configuration(vision, text))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = DualEncoder(configuration(vision, text))
    ours.load_open_clip_state({n: t.clone() for n, t in theirs.state_dict().items()})
    return ours, theirs


def inputs() -> tuple[Tensor, Tensor]:
    token_ids = torch.randint(1, 98, (4, 12))
    for row, end in enumerate((11, 3, 7, 1)):
        token_ids[row, end] = 98
        token_ids[row, end + 1 :] = 0
    return torch.randn(4, 3, 32, 32), token_ids


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_rows_and_gradients_are_those_of_whole_blocks(case: str, recompute: bool) -> None:
    ours, theirs = both(*CASES[case])
    assert isinstance(ours.image.transformer.resblocks[-1], LastBlock)
    assert isinstance(ours.text.transformer.resblocks[-1], LastBlock)
    ours.train()
    theirs.train()
    if recompute:
        ours.image.set_grad_checkpointing(True)
        ours.text.set_grad_checkpointing(True)
    images, token_ids = inputs()
    image, text = ours.encode_image(images), ours.encode_text(token_ids)
    assert_close(image, theirs.encode_image(images, normalize=True))
    assert_close(text, theirs.encode_text(token_ids, normalize=True))
    direction = torch.randn(4, 16)
    (direction * (image + text)).sum().backward()
    (
        direction
        * (
            theirs.encode_image(images, normalize=True)
            + theirs.encode_text(token_ids, normalize=True)
        )
    ).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            other = name.replace("image.", "visual.", 1)
            assert_close(parameter.grad, expected.pop(other), atol=1e-10, rtol=1e-7)
    assert not expected


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_towers_that_are_called_themselves_give_what_open_clips_give(
    case: str, layers: int
) -> None:
    """`vlm refine` calls them: a block that was not told where to read gave an error."""
    vision, text = CASES[case]
    ours, theirs = both({**vision, "layers": layers}, {**text, "layers": layers})
    images, token_ids = inputs()
    assert_close(ours.image(images), theirs.visual(images))
    assert_close(ours.text(token_ids), theirs.text(token_ids))


@pytest.mark.parametrize("case", CASES | NEEDS_ALL)
def test_names_and_order_of_weights_stay_open_clips(case: str) -> None:
    ours, theirs = both(*(CASES | NEEDS_ALL)[case])
    assert list(ours.open_clip_state())[1:] == [n for n in theirs.state_dict() if "logit" not in n]


@pytest.mark.parametrize("case", NEEDS_ALL)
def test_towers_that_read_more_than_one_position_keep_their_last_block(case: str) -> None:
    ours, _ = both(*NEEDS_ALL[case])
    assert not any(isinstance(module, LastBlock) for module in ours.modules())


def test_the_last_block_costs_its_keys_and_values() -> None:
    ours, theirs = both({}, {})
    images, _ = inputs()
    counts = []
    for tower in (theirs.visual, ours.image):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tower.train()(images)
        counts.append(counter.get_total_flops())
    width, places = 32, 17
    per_place = 2 * 12 * width**2  # of a block: 4 w^2 weights in attention, 8 in the MLP
    # What attention itself multiplies is not counted on a processor.
    assert counts[0] - counts[1] == 4 * (places - 1) * per_place * 10 // 12
