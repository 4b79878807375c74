"""Losses with a memory of each sample: exact where nothing is averaged, else their formula."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.testing import assert_close

from tests.support import unit_rows
from tests.vlm.losses.compare import IDS, SCALE, assert_same, features, value_and_gradients
from vlm.losses import LossTerm, total_loss
from vlm.losses.compositional import (
    Side,
    TemperatureRule,
    global_contrastive_loss,
    individual_contrastive_loss,
)
from vlm.losses.pairs import Pairs, negative_pairs
from vlm.types import Features, Memory

UNSEEN = torch.full((23,), -torch.inf, dtype=torch.float64)
TINY = 1e-300
PAIRS = [negative_pairs(None), negative_pairs(IDS)]


def left_out(pairs: Pairs) -> Tensor:
    eye = torch.eye(23, dtype=torch.bool)
    return eye if pairs.row_groups is None else IDS[:, None] == IDS[None]


def denominators(image: Tensor, text: Tensor, pairs: Pairs, *scales: Tensor) -> list[Tensor]:
    """g of the images and of the captions: means of exp(h / tau) over negatives."""
    cosines = image @ text.T
    result = []
    for way, scale in zip((cosines, cosines.T), scales, strict=True):
        potential = ((way - way.diagonal()[:, None]) * scale).exp()
        kept = ~left_out(pairs)
        result.append((potential * kept).sum(dim=1) / kept.sum(dim=1))
    return result


def whole(image: Tensor, text: Tensor, scale: Tensor, pairs: Pairs, rho: float) -> Tensor:
    g = denominators(image, text, pairs, scale, scale)
    return ((g[0].log() + g[1].log()).mean() / 2 + rho) / scale[0]


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("pairs", PAIRS, ids=["alone", "groups"])
def test_without_averaging_it_is_the_loss_of_the_batch_in_value_and_every_gradient(
    pairs: Pairs,
) -> None:
    def ours(i: Tensor, t: Tensor, s: Tensor, rho: float | None = 6.5) -> Tensor:
        return global_contrastive_loss(
            i, t, s, log_image=UNSEEN, log_text=UNSEEN, gamma=1.0, pairs=pairs, rho=rho,
            epsilon=TINY,
        ).value  # fmt: skip

    assert_same(ours, lambda i, t, s: whole(i, t, s, pairs, 6.5), *features(), SCALE)
    fixed = value_and_gradients(lambda i, t, s: ours(i, t, s, None), *features(), SCALE)
    expected = value_and_gradients(lambda i, t: whole(i, t, SCALE, pairs, 0.0), *features())
    for a, b in zip(fixed[:3], expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert torch.equal(fixed[3], torch.zeros(1, dtype=torch.float64))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("rho", [None, 6.5])
def test_with_averaging_the_gradient_is_that_of_g_over_u(rho: float | None) -> None:
    before = [0.3 * unit_rows(23, 1, seed=s)[:, 0] for s in (2, 3)]
    gamma, epsilon = 0.4, 1e-2
    given = features()
    u = [
        (1 - gamma) * old.exp() + gamma * g
        for old, g in zip(before, denominators(*given, PAIRS[1], SCALE, SCALE), strict=True)
    ]

    def formula(i: Tensor, t: Tensor, s: Tensor) -> Tensor:
        scale = s if rho is not None else s.detach()
        g = denominators(i, t, PAIRS[1], scale, scale)
        first = sum((a / (b + epsilon)).mean() for a, b in zip(g, u, strict=True))
        rest = (u[0].log() + u[1].log()).mean() / 2 + (rho or 0.0)
        return (0.5 * first / scale.detach() + rest / scale)[0]

    def ours(i: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return global_contrastive_loss(
            i, t, s, log_image=before[0], log_text=before[1], gamma=gamma, pairs=PAIRS[1],
            rho=rho, epsilon=epsilon,
        ).value  # fmt: skip

    found, expected = (value_and_gradients(loss, *given, SCALE) for loss in (ours, formula))
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)
    after = global_contrastive_loss(
        *given, SCALE, log_image=before[0], log_text=before[1], gamma=gamma, pairs=PAIRS[1]
    )
    assert_close(after.log_image, u[0].log())
    assert_close(after.log_text, u[1].log())


def sides(seed: int = 0) -> list[Side]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Side(
            log_average=torch.randn(23, generator=generator, dtype=torch.float64),
            temperature=0.05 + 0.1 * torch.rand(23, generator=generator, dtype=torch.float64),
            momentum=torch.randn(23, generator=generator, dtype=torch.float64),
        )
        for _ in range(2)
    ]


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("pairs", PAIRS, ids=["alone", "groups"])
def test_temperatures_of_their_own_without_averaging_follow_the_exact_gradient(
    pairs: Pairs,
) -> None:
    before, rho = [side._replace(log_average=UNSEEN) for side in sides()], 0.5
    rule = TemperatureRule(rate=0.01, weight=1.0, lowest=0.001, highest=9.0)

    def ours(i: Tensor, t: Tensor) -> Tensor:
        return individual_contrastive_loss(
            i, t, of_images=before[0], of_texts=before[1], gamma=1.0, pairs=pairs, rho=rho,
            rule=rule, epsilon=TINY,
        )[0]  # fmt: skip

    def direct(i: Tensor, t: Tensor, *temperatures: Tensor) -> Tensor:
        scales = [1 / (tau[:, None]) for tau in temperatures]
        g = denominators(i, t, pairs, *scales)
        parts = [(tau * (d.log() + rho)).mean() for tau, d in zip(temperatures, g, strict=True)]
        return torch.stack(parts).sum() / 2

    taus = [side.temperature for side in before]
    assert_same(ours, lambda i, t: direct(i, t, *taus), *features())
    *_, of_images, of_texts = value_and_gradients(direct, *features(), *taus)
    _, *after = individual_contrastive_loss(
        *features(), of_images=before[0], of_texts=before[1], gamma=1.0, pairs=pairs, rho=rho,
        rule=rule, epsilon=TINY,
    )  # fmt: skip
    for side, tau, gradient in zip(after, taus, (of_images, of_texts), strict=True):
        exact = (2 * 23 * gradient).clamp(-5, 5)  # of one sample, not of the mean of both sides
        assert_close(side.momentum, exact)
        assert_close(side.temperature, tau - 0.01 * exact)


def test_temperatures_keep_within_their_bounds_and_average_their_gradient() -> None:
    before = sides()
    rule = TemperatureRule(rate=100.0, weight=0.9, lowest=0.02, highest=0.5)
    _, *after = individual_contrastive_loss(
        *features(), of_images=before[0], of_texts=before[1], gamma=0.5, pairs=PAIRS[0], rho=1.0,
        rule=rule,
    )  # fmt: skip
    for side, old in zip(after, before, strict=True):
        assert set(side.temperature.tolist()) <= {0.02, 0.5}
        newest = (side.momentum - 0.1 * old.momentum) / 0.9
        assert float(newest.abs().max()) <= 5 + 1e-12


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("kind", ["sogclr", "isogclr", "fastclip_v3"])
def test_a_row_without_negatives_pushes_nothing_and_remembers_nothing(kind: str) -> None:
    term = TypeAdapter(LossTerm).validate_python({"type": kind})
    image, text = (rows.clone().requires_grad_() for rows in features())
    given = Features(
        image=image, text=text, logit_scale=SCALE, logit_bias=None,
        group_ids=torch.zeros(23, dtype=torch.int64),
    )  # fmt: skip
    found = total_loss([term], given, progress=1.0)
    found.total.backward()
    assert torch.isfinite(found.total)
    assert image.grad is not None
    assert torch.equal(image.grad, torch.zeros_like(image))
    assert torch.equal(found.memory.samples[f"{kind}/log_image"], UNSEEN)


def test_opposite_pairs_at_a_temperature_of_a_hundredth_are_finite_in_float32() -> None:
    image = unit_rows(23, 6).float().requires_grad_()
    scale = torch.tensor([100.0], requires_grad=True)
    unseen = UNSEEN.float()
    found = global_contrastive_loss(
        image, -image, scale, log_image=unseen, log_text=unseen, gamma=1.0, pairs=PAIRS[0], rho=8.0
    )
    found.value.backward()
    for tensor in (found.value, image.grad, scale.grad, found.log_image):
        assert tensor is not None
        assert torch.isfinite(tensor).all()
    assert float(found.log_image.max()) > 89  # its exponential is beyond float32


def given() -> Features:
    image, text = features()
    return Features(
        image=image, text=text, logit_scale=SCALE, logit_bias=None, group_ids=torch.arange(23)
    )


@pytest.mark.parametrize("kind", ["sogclr", "isogclr", "fastclip_v3"])
def test_what_a_step_leaves_is_what_the_next_one_starts_from(kind: str) -> None:
    term = TypeAdapter(LossTerm).validate_python({"type": kind, "gamma": 0.3})
    first = total_loss([term], given(), progress=1.0)
    again = total_loss([term], given(), progress=1.0, memory=first.memory)
    anew = total_loss([term], given(), progress=1.0, memory=Memory())
    assert torch.equal(anew.total, first.total)
    # The same batch has the same denominators, so averaging them changes nothing.
    if kind != "isogclr":
        for name, value in first.memory.samples.items():
            assert_close(again.memory.samples[name], value)
    else:
        moved = again.memory.samples["isogclr/temperature_image"]
        assert not torch.equal(moved, first.memory.samples["isogclr/temperature_image"])


def test_gamma_falls_along_a_cosine_and_then_rests() -> None:
    tree: dict[str, Any] = {"type": "fastclip_v3", "gamma": 0.2, "gamma_fraction": 0.5}
    term: Any = TypeAdapter(LossTerm).validate_python(tree)
    found = [term.gamma_at(p) for p in (0.0, 0.125, 0.25, 0.5, 1.0)]
    quarter = 0.5 * (1 + math.cos(math.pi / 4)) * 0.8 + 0.2
    assert found == pytest.approx([1.0, quarter, 0.6, 0.2, 0.2])
    constant: Any = TypeAdapter(LossTerm).validate_python({"type": "sogclr"})
    assert constant.gamma_at(0.0) == 0.8
