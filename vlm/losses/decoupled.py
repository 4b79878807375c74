"""Decoupled contrastive loss: the positive leaves the denominator."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.losses.contrastive import SameGroup, positive_similarity
from vlm.losses.pairs import NoPairsError, Similar, group_sizes, negative_pairs
from vlm.losses.precision import full_precision
from vlm.losses.tiled import log_sum_exp_both_ways
from vlm.types import WHOLE, RowShare

__all__ = ["dcl_loss"]


def dcl_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, "1"],
    *,
    group_ids: Int64[Tensor, " batch"] | None = None,
    same_group: SameGroup = "positive",
    similar: tuple[Similar, ...] = (),
    weight_sigma: float | None = None,
    share: RowShare = WHOLE,
) -> Float[Tensor, ""]:
    r"""InfoNCE whose denominator holds negatives alone; its gain is at small batches.

    $$\tfrac12 \operatorname{mean}_i \big[-w_i s\,c_{ii} + \log\!\sum_{j \ne i} e^{s c_{ij}}\big]
      + \text{the same over columns}$$

    It has no lower bound: only the clamp of the logit scale keeps s from growing.

    Args:
        image: Unit rows; row i matches row i of `text`.
        text: Unit rows.
        logit_scale: The multiplier s of cosines.
        group_ids: Rows with equal ids show the same thing and are never negatives of each other;
            none means all differ.
        same_group: `positive` averages the positive over the group, `mask` takes the row's own
            match alone, `negative` ignores groups.
        similar: Pairs that a teacher finds alike, which leave the denominator; a row left with no
            negative pushes nothing.
        weight_sigma: The von Mises-Fisher weighting of DCLW, 0.5 in the paper: a constant
            w_i = 2 - B softmax_i(c_ii / sigma), larger for pairs that are still far apart. None is
            plain DCL, w_i = 1.
        share: The rows that are reduced here, where other processes reduce the others.

    Raises:
        NoPairsError: If a row has no negative.

    Source: L_DC and L_DCW of Yeh et al. 2021 (arXiv:2110.06848), between modalities.
    """
    groups = None if same_group == "negative" else group_ids
    largest = 1 if groups is None else int(group_sizes(groups).max())
    if largest == len(image):
        message = f"a row has no negative: {len(image)} rows, all of one group"
        raise NoPairsError(message)
    pairs = negative_pairs(groups, similar)
    by_row, by_column = log_sum_exp_both_ways(image, text, logit_scale, pairs=pairs, share=share)
    if similar:
        by_row = by_row.masked_fill(by_row == -torch.inf, 0.0)
        by_column = by_column.masked_fill(by_column == -torch.inf, 0.0)
    positive = positive_similarity(
        full_precision(image), full_precision(text), groups if same_group == "positive" else None
    )
    if weight_sigma is not None:
        shares = (positive.detach() / weight_sigma).softmax(dim=0)
        positive = positive * (2 - len(image) * shares)
    return 0.5 * (by_row.mean() + by_column.mean()) - logit_scale[0] * positive.mean()
