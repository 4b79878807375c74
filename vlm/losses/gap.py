"""Terms that shape the geometry of the two modalities on the sphere.

For unit rows the squared distance is 2 - 2 cos, so each Gaussian potential is a log-sum-exp over
cosines, on the tiled core. All of these belong on the gathered global batch: small batches bias
the logarithm of a mean.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.losses.pairs import NoPairsError, group_sizes, negative_pairs
from vlm.losses.precision import full_precision
from vlm.losses.tiled import log_sum_exp
from vlm.types import WHOLE, RowShare

__all__ = ["alignment", "centroid_uniformity", "cross_uniformity", "uniformity"]


def alignment(
    image: Float[Tensor, "batch dim"], text: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    r"""Mean squared distance of matching rows, in [0, 4].

    $$\operatorname{mean}_i \lVert I_i - T_i \rVert^2 = 2 - 2 \operatorname{mean}_i I_i \cdot T_i$$

    Source: L_align of Wang & Isola 2020 (arXiv:2005.10242) with alpha = 2; L_A of
    arXiv:2405.18570.
    """
    return 2 - 2 * (full_precision(image) * full_precision(text)).sum(dim=1).mean()


def uniformity(
    z: Float[Tensor, "batch dim"],
    *,
    t: float = 2.0,
    group_ids: Int64[Tensor, " batch"] | None = None,
    share: RowShare = WHOLE,
) -> Float[Tensor, ""]:
    r"""Log of the mean Gaussian potential over pairs of rows; lower is more spread out.

    $$\log \operatorname{mean}_{i \ne j} \exp(-t \lVert z_i - z_j \rVert^2)$$

    Args:
        z: Unit rows of one modality.
        t: Sharpness of the potential; the paper uses 2.
        group_ids: Pairs within a group are left out; none leaves out the diagonal alone.
        share: The rows that are reduced here, where other processes reduce the others.

    Returns:
        A scalar in [-4t, 0]; 0 when all rows coincide. Points even on the sphere of dimension d
        have about -4 + 8/d at t = 2.

    Raises:
        NoPairsError: If no pair is left.

    Source: L_uniform of Wang & Isola 2020 (arXiv:2005.10242).
    """
    value = _log_mean_potential(z, z.detach(), t, group_ids, share)
    # The potential is symmetric, so a row's gradient as a column equals that as a row: twice the
    # one, with the value unchanged, saves a third of the backward pass.
    return 2 * value - value.detach()


def cross_uniformity(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    *,
    t: float = 2.0,
    group_ids: Int64[Tensor, " batch"] | None = None,
    share: RowShare = WHOLE,
) -> Float[Tensor, ""]:
    r"""Uniformity between the modalities: over images and captions that do not match.

    $$\log \operatorname{mean}_{i \ne j} \exp(-t \lVert I_i - T_j \rVert^2)$$

    Args and errors as for `uniformity`.

    Source: L_XU of Fahim et al. 2024 (arXiv:2405.18570).
    """
    return _log_mean_potential(image, text, t, group_ids, share)


def centroid_uniformity(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    *,
    t: float = 2.0,
    group_ids: Int64[Tensor, " batch"] | None = None,
    share: RowShare = WHOLE,
) -> Float[Tensor, ""]:
    """Uniformity of the normalised midpoints of matching rows; else as `uniformity`.

    Source: the centroid term of ModGap (ICLR 2026), which drops the factor between modalities.
    """
    midpoints = F.normalize(full_precision(image) + full_precision(text), dim=1)
    return uniformity(midpoints, t=t, group_ids=group_ids, share=share)


def _log_mean_potential(
    left: Float[Tensor, "batch dim"],
    right: Float[Tensor, "batch dim"],
    t: float,
    group_ids: Int64[Tensor, " batch"] | None,
    share: RowShare,
) -> Float[Tensor, ""]:
    num_left_out = len(left) if group_ids is None else int(group_sizes(group_ids).sum())
    num_pairs = len(left) ** 2 - num_left_out
    if num_pairs == 0:
        message = f"no pair to spread: {len(left)} rows, all of one group"
        raise NoPairsError(message)
    # -t times the squared distance is 2t (cos - 1).
    scale = full_precision(left[:0]).new_full((1,), 2 * t)
    by_row = log_sum_exp(left, right, scale, pairs=negative_pairs(group_ids), share=share)
    return torch.logsumexp(by_row, dim=0) - 2 * t - math.log(num_pairs)
