"""The sigmoid loss: every pair of an image and a caption is a yes-or-no question of its own."""

from jaxtyping import Float, Int64
from torch import Tensor

from vlm.losses.contrastive import SameGroup, contrastive_pairs, positive_similarity
from vlm.losses.pairs import Similar, group_sizes
from vlm.losses.precision import full_precision
from vlm.losses.tiled import softplus_sums
from vlm.types import WHOLE, RowShare

__all__ = ["siglip_loss"]


def siglip_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, "1"],
    logit_bias: Float[Tensor, "1"],
    *,
    group_ids: Int64[Tensor, " batch"] | None = None,
    same_group: SameGroup = "positive",
    similar: tuple[Similar, ...] = (),
    share: RowShare = WHOLE,
) -> Float[Tensor, ""]:
    r"""Pairwise sigmoid loss, divided by the number of rows, not of pairs.

    $$-\tfrac1B \sum_{ij} \log\sigma\big(z_{ij}(s\,c_{ij} + b)\big),\quad z_{ij} = \pm 1$$

    Args:
        image: Unit rows; row i matches row i of `text`.
        text: Unit rows.
        logit_scale: The multiplier s of cosines.
        logit_bias: The bias b; starts at -10 in the paper.
        group_ids: Rows with equal ids show the same thing; none means all differ.
        same_group: `positive` asks for yes within a group, `mask` does not ask, `negative`
            ignores groups.
        similar: Pairs that a teacher finds alike, which are not asked, unless of one group.
        share: The rows that are reduced here, where other processes reduce the others.

    Source: equation 1 of SigLIP (arXiv:2303.15343).
    """
    pairs = contrastive_pairs(group_ids, same_group, similar)
    groups = group_ids if same_group == "positive" else None
    sums = softplus_sums(image, text, logit_scale, logit_bias, pairs=pairs, share=share)
    similarity = positive_similarity(full_precision(image), full_precision(text), groups)
    # softplus(-l) = softplus(l) - l turns the question of a positive into that of a negative.
    logits = logit_scale[0] * similarity + logit_bias[0]  # [batch], mean over the positives
    num_positives = 1 if groups is None else group_sizes(groups)
    return (sums - num_positives * logits).mean()
