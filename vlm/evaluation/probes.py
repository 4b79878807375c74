"""Small classifiers on frozen embeddings, in float64."""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = [
    "aligned_prototypes",
    "fit_linear_probe",
    "nearest_prototype",
    "prototypes",
    "sinkhorn",
    "standardised",
]

_ITERATIONS: Final = 200
_SINKHORN_STEPS: Final = 1000
_SINKHORN_TOLERANCE: Final = 1e-4
_TEMPERATURE: Final = 0.05
_MIX: Final = 0.7

Rows = Float[Tensor, "row dim"]


def prototypes(support: Float[Tensor, "way example dim"]) -> Float[Tensor, "way dim"]:
    """The renormalised mean of each class's examples."""
    return F.normalize(support.mean(dim=1), dim=1)


def nearest_prototype(
    means: Float[Tensor, "way dim"], queries: Float[Tensor, "query dim"]
) -> Int64[Tensor, " query"]:
    """The class of the greatest cosine, for unit prototypes."""
    return (queries @ means.T).argmax(dim=1)


def fit_linear_probe(
    rows: Rows, labels: Int64[Tensor, " row"], classes: int, *, c: float = 1.0
) -> Callable[[Float[Tensor, "query dim"]], Float[Tensor, "query class"]]:
    r"""Logistic regression over classes by L-BFGS, with scikit-learn's objective.

    $$\tfrac12 \lVert W \rVert^2 + C \sum_i -\log p(y_i \mid x_i)$$, the intercepts free.

    Args:
        rows: float64.
        labels: 0 to `classes` - 1.
        classes: How many there are.
        c: The weight of the loss.

    Returns:
        From rows to logits.
    """
    weight = torch.zeros(classes, rows.shape[1], dtype=rows.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=rows.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = F.cross_entropy(rows @ weight.T + bias, labels)
        value = fit + 0.5 * weight.square().sum() / (c * len(rows))
        value.backward()
        return value

    optimizer.step(loss)
    fitted, shift = weight.detach(), bias.detach()
    return lambda queries: queries @ fitted.T + shift


def standardised(rows: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Each row with mean 0 and deviation 1 over its coordinates."""
    centred = rows - rows.mean(dim=-1, keepdim=True)
    return centred / centred.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)


def aligned_prototypes(
    means: Float[Tensor, "way dim"], queries: Float[Tensor, "query dim"], *, shots: int
) -> Float[Tensor, "way dim"]:
    """Prototypes moved to where the queries of their classes lie: OpTA of BECLR.

    Each becomes the mean of the queries that an optimal transport plan gives it: five times over
    after one shot, else once and mixed 0.7 to 0.3 with itself. The cost is the squared distance
    over its greatest value.

    Source: BECLR (arXiv:2402.02444), constants of its code (github.com/stypoumic/BECLR).
    """
    for _ in range(5 if shots == 1 else 1):
        cost = torch.cdist(means, queries).square()
        plan = sinkhorn(cost / cost.max().clamp(min=1e-12))
        moved = plan @ queries / plan.sum(dim=1, keepdim=True)
        means = moved if shots == 1 else _MIX * moved + (1 - _MIX) * means
    return means


def sinkhorn(cost: Float[Tensor, "left right"]) -> Float[Tensor, "left right"]:
    """The transport plan between even masses on both sides, with entropy 0.05.

    Source: Sinkhorn's algorithm (arXiv:1306.0895), in logarithms.
    """
    left, right = cost.shape
    scores = -cost / _TEMPERATURE
    log_left = -torch.log(torch.tensor(float(left), dtype=cost.dtype))
    log_right = -torch.log(torch.tensor(float(right), dtype=cost.dtype))
    u, v = torch.zeros(left, 1, dtype=cost.dtype), torch.zeros(1, right, dtype=cost.dtype)
    for _ in range(_SINKHORN_STEPS):
        before = u
        u = log_left - torch.logsumexp(scores + v, dim=1, keepdim=True)
        v = log_right - torch.logsumexp(scores + u, dim=0, keepdim=True)
        if float((u - before).abs().max()) < _SINKHORN_TOLERANCE:
            break
    return (scores + u + v).exp()
