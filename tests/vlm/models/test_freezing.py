"""What is frozen stays as it is, what is recomputed has the same gradients, what drops drops."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support import TINY_COCA, TINY_MODEL
from vlm.errors import ConfigError
from vlm.models import CocaConfig, DualEncoderConfig, build_model

RESNET = {"type": "timm", "name": "test_resnet"}


def built(**changes: Any) -> Any:
    config = DualEncoderConfig.model_validate({**TINY_MODEL, **changes})
    return build_model(config, image_size=32, context_length=8)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.zeros(4, 8, dtype=torch.int64)
    ids[:, :3] = torch.tensor([49406, 320, 49407])
    ids[:, 1] += torch.arange(4)
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), ids


def learning(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_locked_image_tower_keeps_weights_and_statistics() -> None:
    model = built(image=RESNET, freeze={"parameters": ["image.*"]}).train()
    before = {name: tensor.clone() for name, tensor in model.image.state_dict().items()}
    model(*batch()).text.sum().backward()
    assert model.training
    assert model.text.training
    assert not any(module.training for module in model.image.modules())
    assert all(torch.equal(before[n], t) for n, t in model.image.state_dict().items())
    assert all(parameter.grad is None for parameter in model.image.parameters())
    assert all(name.startswith(("text.", "log_logit")) for name in learning(model))
    moving = built(image=RESNET).train()
    moving(*batch())
    assert not torch.equal(moving.image.trunk.bn1.running_mean, before["trunk.bn1.running_mean"])


def test_the_last_blocks_of_a_frozen_tower_learn_with_what_lies_behind_them() -> None:
    model = built(
        image={**TINY_MODEL["image"], "layers": 3},
        freeze={"parameters": ["image.*"], "unlock_last_blocks": 1},
    )
    image = {name for name in learning(model) if name.startswith("image.")}
    assert {name for name in image if "resblocks" not in name} == {
        "image.ln_post.weight", "image.ln_post.bias", "image.proj",
    }  # fmt: skip
    assert {name.split(".")[3] for name in image if "resblocks" in name} == {"2"}
    assert not model.image.transformer.resblocks[1].training
    assert model.image.transformer.resblocks[2].training


def test_patterns_that_freeze_nothing_or_everything_are_told() -> None:
    with pytest.raises(ConfigError, match=r"'visual\.\*' matches no parameter; names begin with"):
        built(freeze={"parameters": ["visual.*"]})
    with pytest.raises(ConfigError, match="nothing is left to learn"):
        built(freeze={"parameters": ["*"]})


@pytest.mark.parametrize("image", [TINY_MODEL["image"], {"type": "timm", "name": "test_vit"}])
def test_recomputed_blocks_give_the_same_gradients(image: dict[str, Any]) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = built(image=image, gradient_checkpointing=recompute)
        images, ids = batch()
        output = model(images, ids)
        (output.image @ output.text.T).diagonal().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


def test_a_coca_recomputes_too_and_keeps_less() -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        tree = {**TINY_COCA, "gradient_checkpointing": recompute}
        model: Any = build_model(CocaConfig.model_validate(tree), image_size=32, context_length=8)
        kept: list[int] = []

        def count(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = model(*batch())
        (output.image.sum() + output.text.sum() + output.captions.hidden.square().sum()).backward()
        found.append(({n: p.grad for n, p in model.named_parameters()}, sum(kept)))
    for name, gradient in found[0][0].items():
        if gradient is not None:
            assert_close(found[1][0][name], gradient)
    assert found[1][1] < found[0][1] / 2


def test_a_tower_that_cannot_recompute_is_told() -> None:
    tower = {"type": "resnet", "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    with pytest.raises(ConfigError, match="the image tower .* cannot do it"):
        built(image=tower, gradient_checkpointing=True)


@pytest.mark.parametrize(
    "image", [TINY_MODEL["image"], {"type": "timm", "name": "test_vit", "pool": "avg"}]
)
def test_patch_dropout_drops_in_training_alone(image: dict[str, Any]) -> None:
    model = built(image={**image, "patch_dropout": 0.5})
    blocks = model.image.trunk.blocks if "name" in image else model.image.transformer.resblocks
    seen = []
    blocks[0].register_forward_pre_hook(lambda _, rows: seen.append(rows[0].shape[1]))
    model.train()(*batch())
    model.eval()(*batch())
    assert seen == ([1 + 2, 1 + 4] if "name" in image else [1 + 8, 1 + 16])
