"""Softmax contrastive losses between matching images and captions."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

__all__ = ["SameGroup", "clip_loss", "same_group_mask"]

SameGroup = Literal["positive", "mask", "negative"]


def clip_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, "1"],
    *,
    group_ids: Int64[Tensor, " batch"] | None = None,
    same_group: SameGroup = "positive",
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    r"""Symmetric InfoNCE over all pairs of the global batch.

    $$\tfrac12\big[\operatorname{mean}_i CE(s c_{i\cdot}, p_i)
      + \operatorname{mean}_j CE(s c_{\cdot j}, p_j)\big],\quad c_{ij} = I_i \cdot T_j$$

    Args:
        image: Unit rows; row i matches row i of `text`.
        text: Unit rows.
        logit_scale: The multiplier s of cosines, at least 0.
        group_ids: Rows with equal ids show the same thing; none means all differ.
        same_group: What other rows of the same group are to a row: `positive` spreads the target
            evenly over the group (the supervised form, arXiv:2004.11362 L_out), `mask` leaves them
            out of the denominator, `negative` ignores groups.
        label_smoothing: Share of the target spread evenly over all columns, in [0, 1); 0.1 in
            ALIGN (arXiv:2102.05918).

    Returns:
        A scalar, at least 0.

    Source: figure 3 of CLIP (arXiv:2103.00020).
    """
    logits = logit_scale * (image @ text.T)  # [batch batch]
    eye = torch.eye(len(image), dtype=torch.bool, device=image.device)
    positives = eye
    if group_ids is not None and same_group != "negative":
        same = same_group_mask(group_ids)
        if same_group == "positive":
            positives = same
        else:
            logits = logits.masked_fill(same & ~eye, -torch.inf)
    return 0.5 * (
        _soft_cross_entropy(logits, positives, label_smoothing)
        + _soft_cross_entropy(logits.T, positives, label_smoothing)
    )


def same_group_mask(group_ids: Int64[Tensor, " batch"]) -> Bool[Tensor, "batch batch"]:
    """Which pairs of rows belong to one group; the diagonal is true."""
    return group_ids[:, None] == group_ids[None, :]


def _soft_cross_entropy(
    logits: Float[Tensor, "batch batch"],
    positives: Bool[Tensor, "batch batch"],
    label_smoothing: float,
) -> Float[Tensor, ""]:
    """Cross-entropy to a target that is even over the positives of each row.

    Columns of -inf are out of the game: they take no share of the smoothing either.
    """
    log_probabilities = F.log_softmax(logits, dim=1)
    allowed = torch.isfinite(logits)
    # 0 * inf is not 0, so masked entries are replaced before they are weighted.
    safe = torch.where(allowed, log_probabilities, 0.0)
    target = positives / positives.sum(dim=1, keepdim=True)
    if label_smoothing:
        even = allowed / allowed.sum(dim=1, keepdim=True)
        target = (1 - label_smoothing) * target + label_smoothing * even
    return -(target * safe).sum(dim=1).mean()
