"""What a step shows beside its loss, looked at when a record is due: gradients and geometry."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.types import DualEncoderOutput

__all__ = ["watch_geometry", "watch_gradients"]

Figures = dict[str, Float[Tensor, ""]]
Rows = Float[Tensor, "batch dim"]

_TOWERS = ("image", "text")


@torch.no_grad()
def watch_gradients(model: nn.Module) -> Figures:
    """`gradient_norm/image` and `gradient_norm/text`, before clipping.

    Sharded gradients are summed over ranks, so all ranks must call it. Towers whose gradients an
    engine keeps to itself (ZeRO) are left out.
    """
    found = {}
    for tower in _TOWERS:
        gradients = [
            p.grad
            for name, p in model.named_parameters()
            if name.startswith((f"{tower}.", f"{tower}_")) and p.grad is not None
        ]
        if gradients:
            norm = nn.utils.get_total_norm(gradients)
            found[f"gradient_norm/{tower}"] = (
                norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            )
    return found


@torch.no_grad()
def watch_geometry(output: DualEncoderOutput) -> Figures:
    """How this rank's rows lie on the sphere, a cheap look at `vlm.evaluation.geometry`'s figures.

    `effective_rank/MODALITY` (RankMe, arXiv:2210.02885) is at most the smaller of rows and
    dimensions; `uniformity_above_floor/MODALITY` is the log mean Gaussian potential
    (arXiv:2005.10242) less what evenly spread points have, -4 + 8/d: 0 is as spread as can be.
    """
    found = {}
    for name, rows in (("image", output.image), ("text", output.text)):
        found[f"effective_rank/{name}"] = _effective_rank(rows.float())
        found[f"uniformity_above_floor/{name}"] = _uniformity_above_floor(rows.float())
    return found


def _effective_rank(rows: Rows) -> Float[Tensor, ""]:
    # The roots of the smaller Gram matrix's eigenvalues are the singular values, much cheaper.
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    if not bool(gram.isfinite().all()):  # a fault for others to find; eigenvalues there are none
        return gram.new_full((), torch.nan)
    shares = torch.linalg.eigvalsh(gram.double()).clamp(min=0).sqrt()
    shares = shares / shares.sum()
    return torch.special.entr(shares).sum().exp().float()


_MAX_ROWS = 1024


def _uniformity_above_floor(rows: Rows) -> Float[Tensor, ""]:
    rows = rows[:_MAX_ROWS]
    exponents = 4 * (rows @ rows.T) - 4  # -2 |x - y|^2 of unit rows
    exponents.fill_diagonal_(-torch.inf)
    pairs = len(rows) * (len(rows) - 1)
    floor = -4 + 8 / rows.shape[1]
    return torch.logsumexp(exponents.flatten(), dim=0) - math.log(max(pairs, 1)) - floor
