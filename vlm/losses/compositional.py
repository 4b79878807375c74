r"""Contrastive losses of the whole dataset, estimated from batches with a memory of each sample.

The denominator of sample i over all data is followed by a moving average u_i of its denominators
in batches, so that small batches do not bias the gradient. With h_ij = c_ij - c_ii and n_i
negatives in the batch,

$$g_i = \tfrac1{n_i} \sum_j e^{h_{ij} / \tau},\quad
  u_i \leftarrow (1 - \gamma) u_i + \gamma g_i,\quad
  \nabla \approx \tau\,\nabla g_i / (u_i + \epsilon)$$

and the same seen from the captions. Everything is kept as logarithms: ln g is a log-sum-exp of the
tiled core, and nothing overflows at a temperature of 0.01. A sample not seen before starts at
u_i = g_i; a row without negatives pushes nothing and remembers nothing.

Values are estimates of the objective, mean tau (ln u + rho); gradients are those of the formula
above, and with gamma = 1 and epsilon -> 0 the exact ones of tau (ln g + rho) over the batch.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.losses.averages import softmax_average
from vlm.losses.pairs import Pairs, num_left_out
from vlm.losses.precision import full_precision
from vlm.losses.tiled import log_sum_exp, log_sum_exp_both_ways
from vlm.types import WHOLE, RowShare

__all__ = [
    "Followed",
    "Side",
    "TemperatureRule",
    "global_contrastive_loss",
    "individual_contrastive_loss",
]

Rows = Float[Tensor, " batch"]
_LARGEST_GRADIENT = 5.0  # of a temperature, as in the published codes


class Followed(NamedTuple):
    """A loss and the moving averages after it."""

    value: Float[Tensor, ""]
    log_image: Rows
    """ln u of the images; -inf is a sample that was never seen with a negative."""
    log_text: Rows


def global_contrastive_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, "1"],
    *,
    log_image: Float[Tensor, " batch"],
    log_text: Float[Tensor, " batch"],
    gamma: float,
    pairs: Pairs,
    rho: float | None = None,
    epsilon: float = 1e-14,
    share: RowShare = WHOLE,
) -> Followed:
    """The loss with one temperature for all samples, 1 / `logit_scale`.

    Args:
        image: Unit rows; row i matches row i of `text`.
        text: Unit rows.
        logit_scale: The multiplier s of cosines.
        log_image: ln u of each image, before this batch.
        log_text: ln u of each caption.
        gamma: Weight of this batch in the averages, in (0, 1].
        pairs: The negatives: every match left out, and what else is none.
        rho: Pull towards a smaller temperature; with it the temperature learns from
            tau (mean ln u + rho). None leaves the temperature without gradient.
        epsilon: Added to u where it divides.
        share: The rows that are reduced here, where other processes reduce the others.

    Source: SogCLR (arXiv:2202.12387) without rho, half of its sum of both sides; with rho
    FastCLIP-v3, RGCL-g of arXiv:2407.01445. The temperature is the logit scale's inverse and is
    moved by the run's optimizer, not by one of its own.
    """
    scale = logit_scale if rho is not None else logit_scale.detach()
    by_row, by_column = log_sum_exp_both_ways(image, text, scale, pairs=pairs, share=share)
    image, text = full_precision(image), full_precision(text)
    match = scale * (image * text).sum(dim=1)
    log_counts = _log_counts(pairs, image, share)
    tau = 1 / scale[0]
    gradient = value = image.new_zeros(())
    after = []
    for log_sums, before in ((by_row, log_image), (by_column, log_text)):
        log_g = _where_seen(log_sums, log_sums - match - log_counts)
        log_u = _follow(before, log_g, gamma)
        after.append(log_u)
        shares = _shares(log_g, log_u, epsilon)
        gradient = gradient + 0.5 * tau.detach() * (shares * _zeroed(log_g)).mean()
        value = value + 0.5 * tau * _zeroed(log_u).mean()
    if rho is not None:
        value = value + tau * rho
        gradient = gradient + value  # through tau alone: u is a constant
    else:
        gradient = gradient + 0.0 * logit_scale.sum()  # data parallelism wants every parameter
    return Followed(gradient - (gradient - value).detach(), *after)


class TemperatureRule(NamedTuple):
    """How each sample's own temperature moves."""

    rate: float = 0.03
    """Step along the averaged gradient."""
    weight: float = 0.9
    """Of the new gradient in its average; 0.9 is what the published code does."""
    lowest: float = 0.005
    highest: float = 1.0


class Side(NamedTuple):
    """What is remembered of each sample of one modality."""

    log_average: Rows
    temperature: Rows
    momentum: Rows


def individual_contrastive_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    *,
    of_images: Side,
    of_texts: Side,
    gamma: float,
    pairs: Pairs,
    rho: float,
    rule: TemperatureRule,
    epsilon: float = 1e-14,
    share: RowShare = WHOLE,
) -> tuple[Float[Tensor, ""], Side, Side]:
    """The loss with a temperature for each image and each caption, which move here.

    Args as for `global_contrastive_loss`; `pairs` must be the same seen from both sides.

    Source: iSogCLR (arXiv:2305.11965), half of its sum of both sides. The gradient of a temperature
    is ln u + rho - E[h] / tau, clipped to 5, with the constants of its code.
    """
    total = full_precision(image).new_zeros(())
    after = []
    log_counts = _log_counts(pairs, image, share)
    one = total.new_ones(1)
    for near, far, side in ((image, text, of_images), (text, image, of_texts)):
        scaled = full_precision(near) / side.temperature[:, None]
        log_sums = log_sum_exp(scaled, far, one, pairs=pairs, share=share)
        match = (scaled * full_precision(far)).sum(dim=1)
        log_g = _where_seen(log_sums, log_sums - match - log_counts)
        log_u = _follow(side.log_average, log_g, gamma)
        shares = _shares(log_g, log_u, epsilon)
        gradient = (side.temperature * shares * _zeroed(log_g)).mean()
        value = (side.temperature * (_zeroed(log_u) + rho)).mean()
        total = total + 0.5 * (gradient - (gradient - value).detach())
        averages = softmax_average(scaled, far, one, far[:, :0], pairs=pairs, share=share)
        push = shares * (averages.logits - match.detach())
        after.append(_cooled(side, log_g, log_u, push, rho=rho, rule=rule, epsilon=epsilon))
    return total, after[0], after[1]


@torch.no_grad()
def _cooled(
    side: Side,
    log_g: Rows,
    log_u: Rows,
    push: Rows,
    *,
    rho: float,
    rule: TemperatureRule,
    epsilon: float,
) -> Side:
    """What is remembered after this batch, temperatures moved."""
    gradient = (_plus(log_u, epsilon) + rho - push).clamp(-_LARGEST_GRADIENT, _LARGEST_GRADIENT)
    momentum = (1 - rule.weight) * side.momentum + rule.weight * gradient
    moved = (side.temperature - rule.rate * momentum).clamp(rule.lowest, rule.highest)
    seen = log_g.isfinite()
    return Side(
        log_average=log_u,
        temperature=torch.where(seen, moved, side.temperature),
        momentum=torch.where(seen, momentum, side.momentum),
    )


def _log_counts(pairs: Pairs, rows: Tensor, share: RowShare) -> Rows:
    """Logarithm of the number of negatives of each row, 0 where there is none."""
    left_out = num_left_out(pairs, len(rows), len(rows), rows.device, share=share)
    counts = (len(rows) - left_out).clamp(min=1)
    return counts.to(full_precision(rows[:0]).dtype).log()


def _where_seen(log_sums: Rows, log_g: Rows) -> Rows:
    return log_g.masked_fill(log_sums == -torch.inf, -torch.inf)


@torch.no_grad()
def _follow(before: Rows, log_g: Rows, gamma: float) -> Rows:
    """The new average; g where there is no usable u, and u where there is no g."""
    before = before.to(log_g.dtype)
    if gamma >= 1:
        mixed = log_g
    else:
        mixed = torch.logaddexp(before + math.log1p(-gamma), log_g + math.log(gamma))
    mixed = torch.where(before.isfinite(), mixed, log_g)
    return torch.where(log_g.isfinite(), mixed, before)


@torch.no_grad()
def _shares(log_g: Rows, log_u: Rows, epsilon: float) -> Rows:
    """Each g / (u + epsilon); 0 where there is no g."""
    return (log_g - _plus(log_u, epsilon)).exp()


def _plus(log_u: Rows, epsilon: float) -> Rows:
    return torch.logaddexp(log_u, torch.full_like(log_u, math.log(epsilon)))


def _zeroed(logarithms: Rows) -> Rows:
    return logarithms.masked_fill(~logarithms.isfinite(), 0.0)
