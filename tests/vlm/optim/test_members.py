"""What holds for every optimizer of the union, and what each of them does."""

import io
from pathlib import Path
from typing import Any, get_args

import pytest
import timm.optim.adafactor_bv
import timm.optim.lamb
import timm.optim.lion
import torch
from torch import nn
from torch.testing import assert_close

from vlm.optim import (
    AdafactorConfig,
    AdamWConfig,
    LambConfig,
    Lion,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    build_optimizer,
    parameter_groups,
    set_learning_rates,
)
from vlm.optim.base import OptimizerSettings
from vlm.optim.lion_triton import fused_lion, fuses

MEMBERS = get_args(get_args(OptimizerConfig)[0])
EVERY: list[Any] = [
    *(member() for member in MEMBERS),
    LionConfig(cautious=True, momentum_precision="bf16"),
]


class Net(nn.Module):
    """Named as the models name their parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Flatten(), nn.Linear(32, 32))
        self.text = nn.ModuleDict({"token_embedding": nn.Embedding(20, 32)})
        self.text["hidden"] = self.hidden = nn.Linear(32, 32)
        self.text_projection = nn.Linear(32, 32, bias=False)
        self.log_logit_scale = nn.Parameter(torch.ones(1))


def walk(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def built(net: Net, config: Any) -> torch.optim.Optimizer:
    return build_optimizer(net.named_parameters(), config)


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c.type)
def test_a_run_resumed_from_a_file_without_pickles_is_bitwise_the_uninterrupted_one(
    config: Any,
) -> None:
    straight, net = Net(), Net()
    walk(straight, built(straight, config), range(6))
    first = built(net, config)
    walk(net, first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = built(net, config)
    second.load_state_dict(torch.load(file, weights_only=True))
    set_learning_rates(second, 1.0)
    walk(net, second, range(3, 6))
    assert all(
        torch.equal(a, b) for a, b in zip(net.parameters(), straight.parameters(), strict=True)
    )
    assert all((p != q).any() for p, q in zip(net.parameters(), Net().parameters(), strict=True))


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c.type)
def test_no_rule_moves_without_a_learning_rate_and_the_logit_scale_moves_at_its_own(
    config: Any,
) -> None:
    net = Net()
    optimizer = built(net, config)
    set_learning_rates(optimizer, 0.0)
    walk(net, optimizer, range(2))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), Net().parameters(), strict=True))
    net = Net()
    walk(net, built(net, config), range(1))
    # All rules but Lion's AdamW start with a step of about the rate of the scalars.
    assert 0 < abs(net.log_logit_scale.item() - 1) <= config.scalar_lr * 1.01


def test_cautious_lion_equals_timms_over_100_steps() -> None:
    ours, theirs = Net(), Net()
    walk(ours, Lion(ours.parameters(), lr=1e-2, weight_decay=0.1, cautious=True), range(100))
    reference = timm.optim.lion.Lion(theirs.parameters(), lr=1e-2, weight_decay=0.1, caution=True)
    walk(theirs, reference, range(100))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=1e-6)


def test_a_bf16_momentum_takes_half_the_memory_and_stays_so_after_loading() -> None:
    net = Net()
    optimizer = built(net, LionConfig(momentum_precision="bf16"))
    walk(net, optimizer, range(2))
    matrix = net.hidden.weight
    assert optimizer.state[matrix]["exp_avg"].dtype == torch.bfloat16
    optimizer.load_state_dict(optimizer.state_dict())
    walk(net, optimizer, range(2, 3))
    assert optimizer.state[matrix]["exp_avg"].dtype == torch.bfloat16
    exact = Net()
    walk(exact, built(exact, LionConfig()), range(3))
    turned = torch.ne(matrix, exact.hidden.weight).float().mean()
    assert turned < 0.02  # only where the update is within a rounding of 0


def test_lamb_moves_each_matrix_by_the_rate_times_its_own_norm() -> None:
    net = Net()
    before = net.hidden.weight.detach().clone()
    walk(net, built(net, LambConfig(lr=0.01, weight_decay=1e-9)), range(1))
    moved = (net.hidden.weight - before).norm()
    assert_close(moved, 0.01 * before.norm(), rtol=1e-4, atol=0)


def test_adafactor_remembers_rows_and_columns_of_a_matrix_and_a_bf16_momentum() -> None:
    net = Net()
    optimizer = built(net, AdafactorConfig())
    walk(net, optimizer, range(1))
    state = optimizer.state[net.hidden.weight]
    assert state["exp_avg_sq_r"].numel() == state["exp_avg_sq_c"].numel() == 32
    assert state["exp_avg"].dtype == torch.bfloat16


def test_muon_orthogonalises_hidden_matrices_and_leaves_the_rest_to_adamw() -> None:
    net, adamw = Net(), Net()
    before = net.hidden.weight.detach().clone()
    optimizer = built(net, MuonConfig(lr=0.01, weight_decay=0.0))
    walk(net, optimizer, range(1))
    walk(adamw, built(adamw, AdamWConfig(lr=0.01, weight_decay=0.0)), range(1))
    moved = (before - net.hidden.weight).detach() / 0.01
    singular = torch.linalg.svdvals(moved) / (0.2 * 32**0.5)
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    names = {id(p): name for name, p in net.named_parameters()}
    hidden = {names[id(p)] for g in optimizer.param_groups if g["hidden"] for p in g["params"]}
    assert hidden == {"image.2.weight", "text.hidden.weight"}
    for name, parameter in net.named_parameters():
        if name not in hidden:
            assert torch.equal(parameter, dict(adamw.named_parameters())[name])


def test_muon_of_a_model_without_matrices_is_adamw() -> None:
    net = nn.Conv2d(3, 4, 2)
    optimizer = build_optimizer(net.named_parameters(), MuonConfig())
    net(torch.ones(1, 3, 2, 2)).sum().backward()
    optimizer.step(lambda: 0.0)
    assert len(optimizer.state) == 2


def test_embeddings_and_scales_do_not_decay_and_towers_learn_at_their_own_rate() -> None:
    net = Net()
    config = AdamWConfig(lr=1.0, image_lr_factor=0.1)
    optimizer = built(net, config)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {
        names[id(p)]: (group["weight_decay"], round(group["lr"], 6), group["name"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found == {
        "image.0.weight": (0.2, 0.1, "decay x 0.1"),
        "image.0.bias": (0.0, 0.1, "no_decay x 0.1"),
        "image.2.weight": (0.2, 0.1, "hidden x 0.1"),
        "image.2.bias": (0.0, 0.1, "no_decay x 0.1"),
        "text.token_embedding.weight": (0.0, 1.0, "no_decay"),
        "text.hidden.weight": (0.2, 1.0, "hidden"),
        "text.hidden.bias": (0.0, 1.0, "no_decay"),
        "text_projection.weight": (0.2, 1.0, "decay"),
        "log_logit_scale": (0.0, 1e-3, "scalars"),
    }


def test_lower_layers_learn_slower_in_each_tower() -> None:
    net = Net()
    depths = {"image.0": 0, "image.2": 1, "text.token_embedding": 0, "text.hidden": 1}
    groups = parameter_groups(
        net.named_parameters(),
        lr=1.0,
        weight_decay=0.1,
        scalar_lr=1.0,
        betas=(0.9, 0.9),
        layer_decay=0.5,
        depth=lambda name: depths.get(name.rpartition(".")[0]),
    )
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in net.named_parameters() if "bias" not in name}
    assert found == {
        "image.0.weight": 0.25,
        "image.2.weight": 0.5,
        "text.token_embedding.weight": 0.25,
        "text.hidden.weight": 0.5,
        "text_projection.weight": 1.0,
        "log_logit_scale": 1.0,
    }
    with pytest.raises(ValueError, match="depth of every parameter"):
        build_optimizer(net.named_parameters(), AdamWConfig(layer_decay=0.5))


def test_adamws_rate_under_lion_is_noticed_and_what_to_take_instead_is_said() -> None:
    (line,) = LionConfig(lr=1e-3, weight_decay=0.2).advice()
    assert "try optim.lr=0.0001 optim.weight_decay=2" in line
    assert AdamWConfig(lr=1e-3, weight_decay=0.2).as_lion() == (
        "optim.type=lion optim.lr=0.0001 optim.weight_decay=2"
    )
    assert not LionConfig(lr=7e-4, weight_decay=1.0).advice()
    assert not AdamWConfig().advice()


def test_settings_of_no_optimizer_build_none() -> None:
    with pytest.raises(NotImplementedError):
        OptimizerSettings().build([])


def test_the_kernel_is_for_large_tensors_on_cuda_alone() -> None:
    large = torch.zeros(2**17)
    assert not fuses(large, large, large)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_step_equals_the_plain_one_on_cuda(dtype: torch.dtype) -> None:
    plain, fused = Net().cuda().to(torch.float32), Net().cuda()
    matrix, other = plain.hidden.weight, fused.hidden.weight
    momentum = torch.zeros_like(other, dtype=dtype)
    optimizer = Lion([matrix], lr=1e-2, weight_decay=0.1, momentum_dtype=dtype)
    for step in range(100):
        generator = torch.Generator("cuda").manual_seed(step)
        matrix.grad = torch.randn(matrix.shape, device="cuda", generator=generator)
        optimizer.step()  # too small for the kernel
        settings: Any = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
        fused_lion(other.detach(), matrix.grad, momentum, **settings)
    assert_close(other, matrix, rtol=0, atol=1e-6)


def test_every_optimizer_has_a_row_in_the_table() -> None:
    table = (Path(__file__).parents[3] / "vlm/optim/README.md").read_text()
    for member in MEMBERS:
        assert f"| `{member.model_fields['type'].default}` |" in table
