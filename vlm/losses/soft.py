"""Contrastive losses whose targets are similarities: soft targets and distillation.

Targets are a softmax over similarities of other features, a teacher's or of labels. They come as
those features, so that a tile of targets is computed where it is used and no B x B matrix is kept.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.losses.averages import softmax_average
from vlm.losses.pairs import Pairs
from vlm.losses.precision import full_precision
from vlm.losses.tiled import log_sum_exp_both_ways
from vlm.types import WHOLE, RowShare

__all__ = ["SoftTarget", "multi_hot", "soft_target_loss"]


@dataclass(frozen=True, kw_only=True)
class SoftTarget:
    """The distribution softmax_j(scale * rows_i . columns_j) that a row's softmax should meet.

    Rows are a teacher's embeddings, or labels: of multi-hot rows of unit length, the dot product
    is the cosine of the label sets (the similarity of SoftCon, arXiv:2405.20462).
    """

    rows: Float[Tensor, "batch width"]
    columns: Float[Tensor, "batch width"]
    scale: Float[Tensor, "1"]
    """Inverse temperature of the targets."""


def multi_hot(
    label_ids: Int64[Tensor, "batch label"],
) -> Float[Tensor, "batch distinct"]:
    """Unit rows with an entry for each label of the batch, whose dot products compare label sets.

    |A and B| / sqrt(|A| |B|), in [0, 1]; a row without labels is like itself alone.

    Args:
        label_ids: Not below 0, and -1 behind the last label of a row.
    """
    rows = torch.arange(len(label_ids), device=label_ids.device)
    alone = (label_ids < 0).all(dim=1, keepdim=True)
    # A label of its own for a row that has none: -2 and below, which no label is.
    label_ids = torch.cat([label_ids, torch.where(alone, -2 - rows[:, None], -1)], dim=1)
    known, places = torch.unique(label_ids, return_inverse=True)
    hot = torch.zeros(len(rows), len(known), device=label_ids.device).scatter_(1, places, 1.0)
    return F.normalize(hot[:, known != -1], dim=1)


def soft_target_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, "1"],
    *,
    for_images: SoftTarget,
    for_texts: SoftTarget,
    soft_fraction: float = 1.0,
    share: RowShare = WHOLE,
) -> Float[Tensor, ""]:
    r"""Divergence of the softmax over captions from a soft target, and of that over images.

    $$\tfrac12 \operatorname{mean}_i KL\big(p_i \,\|\, \operatorname{softmax}(s c_{i\cdot})\big)
      + \text{the same over columns},\quad p_{ij} = (1 - a)\,[i = j] + a\,q_{ij}$$

    Its gradients are those of the cross-entropy against p, whose entropy is a constant. Targets
    get no gradient. With a = 0 it is InfoNCE.

    Args:
        image: Unit rows; row i matches row i of `text`.
        text: Unit rows.
        logit_scale: The multiplier s of cosines.
        for_images: q of the rows: one row an image, one column a caption.
        for_texts: q of the columns: one row a caption, one column an image.
        soft_fraction: The share a of q in the target, in [0, 1]; the rest is the row's own match.
        share: The rows that are reduced here, where other processes reduce the others.

    Returns:
        A scalar, at least 0 up to rounding.

    Source: in-modal similarities as targets are those of SoftCLIP (arXiv:2303.17561); a teacher's
    cross-modal ones are CLIP distillation, and with a = 0.5 HyCD of CLIP-Refine (arXiv:2504.12717).
    """
    by_row, by_column = log_sum_exp_both_ways(image, text, logit_scale, pairs=Pairs(), share=share)
    image, text = full_precision(image), full_precision(text)
    total = by_row.mean() + by_column.mean()
    for near, far, target in ((image, text, for_images), (text, image, for_texts)):
        average = softmax_average(
            target.rows, target.columns, target.scale, far, pairs=Pairs(), share=share
        )
        to_match, to_others = (near * far).sum(dim=1), (near * average.values).sum(dim=1)
        expected = (1 - soft_fraction) * to_match + soft_fraction * share.total(to_others)
        total = total - logit_scale[0] * expected.mean()
        entropies = _entropies(target, average.logits, average.log_sum_exp, soft_fraction)
        total = total - entropies.mean()
    return 0.5 * total


@torch.no_grad()
def _entropies(
    target: SoftTarget,
    mean_logits: Float[Tensor, " batch"],
    log_sums: Float[Tensor, " batch"],
    soft_fraction: float,
) -> Float[Tensor, " batch"]:
    """Entropy of (1 - a) [i = j] + a q_ij, from that of q and its share of the match."""
    rows, columns = full_precision(target.rows), full_precision(target.columns)
    match = (target.scale * (rows * columns).sum(dim=1) - log_sums).exp().clamp(max=1.0)
    others = log_sums - mean_logits - torch.special.entr(match)  # of q, without the match
    share = torch.tensor(soft_fraction, dtype=match.dtype, device=match.device)
    return (
        share * others
        + torch.special.entr(share) * (1 - match)
        + torch.special.entr(1 - share + share * match)
    )
