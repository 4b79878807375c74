"""The sigmoid loss: every pair of an image and a caption is a yes-or-no question of its own."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.losses.contrastive import SameGroup, same_group_mask

__all__ = ["siglip_loss"]


def siglip_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, "1"],
    logit_bias: Float[Tensor, "1"],
    *,
    group_ids: Int64[Tensor, " batch"] | None = None,
    same_group: SameGroup = "positive",
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

    Source: equation 1 of SigLIP (arXiv:2303.15343).
    """
    logits = logit_scale * (image @ text.T) + logit_bias  # [batch batch]
    eye = torch.eye(len(image), dtype=torch.bool, device=image.device)
    positives, asked = eye, torch.ones_like(eye)
    if group_ids is not None and same_group != "negative":
        same = same_group_mask(group_ids)
        if same_group == "positive":
            positives = same
        else:
            asked = ~same | eye
    signed = torch.where(positives, logits, -logits)
    return -(F.logsigmoid(signed) * asked).sum() / len(image)
