import copy
import math

import pytest
import timm.optim.lion
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.testing import assert_close

from vlm.optim import (
    AdamWConfig,
    Lion,
    LionConfig,
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    learning_rate_factor,
    parameter_groups,
    set_learning_rates,
)


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(7))]


def walk(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lion_equals_timms_over_100_steps(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    walk(Lion(ours, lr=1e-2, betas=(0.9, 0.99), weight_decay=weight_decay), ours, range(100))
    reference = timm.optim.lion.Lion(theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=weight_decay)
    walk(reference, theirs, range(100))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=0, atol=1e-6)


def test_the_adamw_rule_equals_torchs_adamw() -> None:
    ours, theirs = parameters(), parameters()
    group = {"params": ours, "lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1, "rule": "adamw"}
    walk(Lion([group]), ours, range(50))
    walk(torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1), theirs, range(50))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=0, atol=1e-6)


def test_lion_resumes_from_its_state_bitwise() -> None:
    straight = parameters()
    walk(Lion(straight, lr=1e-2), straight, range(20))
    params = parameters()
    first = Lion(params, lr=1e-2)
    walk(first, params, range(10))
    state = copy.deepcopy(first.state_dict())
    second = Lion(params, lr=1e-2)
    second.load_state_dict(state)
    walk(second, params, range(10, 20))
    assert all(torch.equal(a, b) for a, b in zip(params, straight, strict=True))


def test_under_lion_a_scalar_moves_exactly_the_learning_rate() -> None:
    scalar = nn.Parameter(torch.tensor([1.0]))
    optimizer = Lion([scalar], lr=0.125)
    scalar.grad = torch.tensor([1e-9])
    optimizer.step()
    assert scalar.item() == 0.875


def test_a_parameter_without_gradient_stays() -> None:
    first, second = parameters()
    before = second.detach().clone()
    first.grad = torch.ones_like(first)
    Lion([first, second], lr=0.1, weight_decay=1.0).step()
    assert torch.equal(second, before)


def test_an_impossible_setting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"betas=\(0.9, 1.0\)"):
        Lion(parameters(), betas=(0.9, 1.0))


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="'lion' or 'adamw', got 'sgd'"):
        Lion([{"params": parameters(), "rule": "sgd"}])


def test_one_state_holds_both_rules_and_resumes_bitwise() -> None:
    def build(params: list[nn.Parameter]) -> Lion:
        return Lion([{"params": params[:1]}, {"params": params[1:], "rule": "adamw"}], lr=1e-2)

    straight, params = parameters(), parameters()
    walk(build(straight), straight, range(20))
    first = build(params)
    walk(first, params, range(10))
    second = build(params)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    walk(second, params, range(10, 20))
    assert all(torch.equal(a, b) for a, b in zip(params, straight, strict=True))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.positional_embedding = nn.Parameter(torch.zeros(5, 4))
        self.log_logit_scale = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_only_matrices_decay_and_the_logit_scale_learns_by_adamw() -> None:
    groups = {
        group["name"]: group
        for group in parameter_groups(
            Model().named_parameters(), lr=1e-3, weight_decay=0.5, scalar_lr=2e-3, betas=(0.9, 0.99)
        )
    }
    assert [tuple(p.shape) for p in groups["hidden"]["params"]] == [(4, 3)]
    assert sorted(tuple(p.shape) for p in groups["no_decay"]["params"]) == [
        (4,),
        (4,),
        (4,),
        (5, 4),
    ]
    assert groups["no_decay"]["weight_decay"] == 0
    scalars = groups["scalars"]
    assert (len(scalars["params"]), scalars["rule"], scalars["lr"]) == (1, "adamw", 2e-3)


@pytest.mark.parametrize("config", [LionConfig(), AdamWConfig()])
def test_build_remembers_peaks_and_set_scales_them(config: LionConfig | AdamWConfig) -> None:
    optimizer = build_optimizer(Model().named_parameters(), config)
    set_learning_rates(optimizer, 0.5)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"hidden": config.lr / 2, "no_decay": config.lr / 2, "scalars": 5e-4}


def test_an_unknown_optimizer_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'lion', 'adamw', 'lamb', 'adafactor', 'muon'"):
        TypeAdapter(OptimizerConfig).validate_python({"type": "sgd"})


def factor(step: int, **config: object) -> float:
    return learning_rate_factor(ScheduleConfig.model_validate(config), step, 100)


def test_schedules_at_their_corners() -> None:
    assert factor(0, warmup_fraction=0.1) == pytest.approx(1 / 11)
    assert factor(10, warmup_fraction=0.1) == pytest.approx(1.0)
    assert factor(55, warmup_fraction=0.1) == pytest.approx(0.5)
    assert factor(100, warmup_fraction=0.1, final_fraction=0.1) == pytest.approx(0.1)
    assert factor(55, type="linear", warmup_fraction=0.1) == pytest.approx(0.5)
    assert factor(79, type="constant") == 1.0
    assert factor(90, type="constant") == pytest.approx(0.5)
    assert factor(40, type="rsqrt", warmup_fraction=0.1) == pytest.approx(math.sqrt(10 / 40))


def test_warmup_steps_take_the_place_of_the_fraction() -> None:
    assert factor(3, warmup_steps=4, warmup_fraction=0.5) == pytest.approx(4 / 5)
    assert factor(4, warmup_steps=4, warmup_fraction=0.5) == pytest.approx(1.0)
    assert factor(0, warmup_steps=0) == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "rsqrt"])
def test_every_schedule_rises_to_at_most_the_peak_and_then_falls(kind: str) -> None:
    values = [factor(step, type=kind, warmup_fraction=0.2) for step in range(101)]
    assert all(a <= b for a, b in zip(values[:20], values[1:21], strict=True))
    assert all(a >= b for a, b in zip(values[20:], values[21:], strict=False))
    assert max(values) == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.0)


def test_warmup_and_cooldown_may_be_given_in_samples() -> None:
    config = ScheduleConfig(type="constant", warmup_samples=90, cooldown_samples=200)
    at = [learning_rate_factor(config, step, 100, global_batch=10) for step in (8, 9, 80, 90)]
    assert at == [pytest.approx(9 / 10), 1.0, 1.0, pytest.approx(0.5)]
    with pytest.raises(ValueError, match="not both"):
        ScheduleConfig(warmup_steps=1, warmup_samples=1)
