"""Terms that shape the geometry of the two modalities on the sphere.

For unit rows the squared distance is 2 - 2 cos, so each Gaussian potential is a log-sum-exp over
a matrix of cosines. All of these belong on the gathered global batch: the logarithm of a mean does
not split into parts of ranks, and small batches bias it.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vlm.losses.contrastive import same_group_mask

__all__ = ["alignment", "centroid_uniformity", "cross_uniformity", "uniformity"]


def alignment(
    image: Float[Tensor, "batch dim"], text: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    r"""Mean squared distance of matching rows, in [0, 4].

    $$\operatorname{mean}_i \lVert I_i - T_i \rVert^2 = 2 - 2 \operatorname{mean}_i I_i \cdot T_i$$

    Source: L_align of Wang & Isola 2020 (arXiv:2005.10242) with alpha = 2; L_A of
    arXiv:2405.18570.
    """
    return 2 - 2 * (image * text).sum(dim=1).mean()


def uniformity(
    z: Float[Tensor, "batch dim"],
    *,
    t: float = 2.0,
    group_ids: Int64[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    r"""Log of the mean Gaussian potential over pairs of rows; lower is more spread out.

    $$\log \operatorname{mean}_{i \ne j} \exp(-t \lVert z_i - z_j \rVert^2)$$

    Args:
        z: Unit rows of one modality.
        t: Sharpness of the potential; the paper uses 2.
        group_ids: Pairs within a group are left out; none leaves out the diagonal alone.

    Returns:
        A scalar in [-4t, 0]; 0 when all rows coincide. Points even on the sphere of dimension d
        have about -4 + 8/d at t = 2.

    Raises:
        ValueError: If no pair is left.

    Source: L_uniform of Wang & Isola 2020 (arXiv:2005.10242).
    """
    return _log_mean_potential(z, z, t, group_ids)


def cross_uniformity(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    *,
    t: float = 2.0,
    group_ids: Int64[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    r"""Uniformity between the modalities: over images and captions that do not match.

    $$\log \operatorname{mean}_{i \ne j} \exp(-t \lVert I_i - T_j \rVert^2)$$

    Args and errors as for `uniformity`.

    Source: L_XU of Fahim et al. 2024 (arXiv:2405.18570).
    """
    return _log_mean_potential(image, text, t, group_ids)


def centroid_uniformity(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    *,
    t: float = 2.0,
    group_ids: Int64[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Uniformity of the normalised midpoints of matching rows; else as `uniformity`.

    Source: the centroid term of ModGap (ICLR 2026), which drops the factor between modalities.
    """
    midpoints = torch.nn.functional.normalize(image + text, dim=1)
    return uniformity(midpoints, t=t, group_ids=group_ids)


def _log_mean_potential(
    left: Float[Tensor, "batch dim"],
    right: Float[Tensor, "batch dim"],
    t: float,
    group_ids: Int64[Tensor, " batch"] | None,
) -> Float[Tensor, ""]:
    left_out = _left_out(left, group_ids)
    num_pairs = int((~left_out).sum())
    if num_pairs == 0:
        message = f"no pair to spread: {len(left)} rows, all of one group"
        raise ValueError(message)
    potentials = 2 * t * (left @ right.T - 1)  # [batch batch], -t times the squared distance
    potentials = potentials.masked_fill(left_out, -torch.inf)
    return torch.logsumexp(potentials.flatten(), dim=0) - math.log(num_pairs)


def _left_out(
    rows: Float[Tensor, "batch dim"], group_ids: Int64[Tensor, " batch"] | None
) -> Bool[Tensor, "batch batch"]:
    if group_ids is None:
        return torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return same_group_mask(group_ids)
