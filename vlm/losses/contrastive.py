"""Softmax contrastive losses between matching images and captions."""

from typing import Literal

from jaxtyping import Float, Int64
from torch import Tensor

from vlm.losses.pairs import Pairs, Similar, group_sizes, group_sums
from vlm.losses.precision import full_precision
from vlm.losses.tiled import log_sum_exp_both_ways
from vlm.types import WHOLE, RowShare

__all__ = ["SameGroup", "clip_loss", "contrastive_pairs", "positive_similarity"]

SameGroup = Literal["positive", "mask", "negative"]


def clip_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, "1"],
    *,
    group_ids: Int64[Tensor, " batch"] | None = None,
    same_group: SameGroup = "positive",
    similar: tuple[Similar, ...] = (),
    label_smoothing: float = 0.0,
    share: RowShare = WHOLE,
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
        similar: Pairs that a teacher finds alike and that leave the denominator, unless they are
            of one group; the false-negative mask of MultiCSR.
        label_smoothing: Share of the target spread evenly over all columns, in [0, 1); 0.1 in
            ALIGN (arXiv:2102.05918). Masked columns take no share.
        share: The rows that are reduced here, where other processes reduce the others.

    Returns:
        A scalar, at least 0 up to rounding.

    Raises:
        ValueError: If both `similar` and `label_smoothing` are given.

    Source: figure 3 of CLIP (arXiv:2103.00020).
    """
    if similar and label_smoothing:
        message = f"label_smoothing={label_smoothing} cannot be spread over a similarity mask"
        raise ValueError(message)
    pairs = contrastive_pairs(group_ids, same_group, similar)
    masked = group_ids if same_group == "mask" else None
    by_row, by_column = log_sum_exp_both_ways(image, text, logit_scale, pairs=pairs, share=share)
    image, text = full_precision(image), full_precision(text)
    group_ids = group_ids if same_group == "positive" else None
    # Targets are linear in the logits, so cosines are averaged first and scaled once.
    target = positive_similarity(image, text, group_ids).mean()
    if label_smoothing:
        even = 0.5 * (_mean_similarity(image, text, masked) + _mean_similarity(text, image, masked))
        target = (1 - label_smoothing) * target + label_smoothing * even
    return 0.5 * (by_row.mean() + by_column.mean()) - logit_scale[0] * target


def contrastive_pairs(
    group_ids: Int64[Tensor, " batch"] | None,
    same_group: SameGroup,
    similar: tuple[Similar, ...] = (),
) -> Pairs:
    """The pairs of a denominator that keeps each row's own match."""
    if group_ids is None or same_group == "negative":
        return Pairs(similar=similar)
    return Pairs(
        left_out="others_of_group" if same_group == "mask" else "none",
        row_groups=group_ids,
        column_groups=group_ids,
        similar=similar,
    )


def positive_similarity(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    group_ids: Int64[Tensor, " batch"] | None,
) -> Float[Tensor, " batch"]:
    """For each image, the mean cosine to the captions of its group; to its own without groups.

    Its mean over the batch is the same seen from the captions.
    """
    if group_ids is not None:
        text = group_sums(text, group_ids) / group_sizes(group_ids)[:, None]
    return (image * text).sum(dim=1)


def _mean_similarity(
    rows: Float[Tensor, "batch dim"],
    columns: Float[Tensor, "batch dim"],
    masked_groups: Int64[Tensor, " batch"] | None,
) -> Float[Tensor, ""]:
    """Mean over rows of the mean cosine to every column that is not masked."""
    if masked_groups is None:
        return (rows.mean(dim=0) * columns.mean(dim=0)).sum()
    allowed = columns.sum(dim=0) - group_sums(columns, masked_groups) + columns
    num_allowed = len(columns) - group_sizes(masked_groups) + 1
    return ((rows * allowed).sum(dim=1) / num_allowed).mean()
