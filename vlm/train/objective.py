"""From one rank's embeddings to the loss of the global batch.

Features are gathered once, with gradient, for all terms; every rank then computes the same global
loss, which makes W ranks on B/W samples each equal to one process on B, for any sum of terms.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor

from vlm.distributed import World, gather_rows, gather_rows_with_gradient, sum_with_gradient
from vlm.losses import LossTerm, total_loss
from vlm.types import Captions, DualEncoderOutput, Features, LossOutput

__all__ = ["global_loss"]


def global_loss(
    output: DualEncoderOutput,
    group_ids: Int64[Tensor, " batch"],
    terms: Sequence[LossTerm],
    *,
    progress: float,
    world: World,
) -> LossOutput:
    """Gather the features of all ranks and sum the weighted loss terms.

    Args:
        output: This rank's embeddings, logit scale and bias.
        group_ids: This rank's groups; equal groups are never negatives of each other.
        terms: The loss, as configured.
        progress: Fraction of training done, in [0, 1]; drives weight schedules.
        world: The ranks. All must bring equally many rows.

    Returns:
        The total and its statistics, with `modality_gap` (distance between the centroids of the
        two modalities, 0 to 2) and `logit_scale` beside those of the terms.
    """
    both = torch.cat([output.image, output.text], dim=1).float()  # [batch 2*dim], one message
    image, text = gather_rows_with_gradient(both, world).chunk(2, dim=1)
    features = Features(
        image=image,
        text=text,
        logit_scale=output.logit_scale.float(),
        logit_bias=None if output.logit_bias is None else output.logit_bias.float(),
        group_ids=gather_rows(group_ids, world),
        captions=None
        if output.captions is None
        else Captions(rows=output.captions, sum_over_ranks=partial(sum_with_gradient, world=world)),
    )
    result = total_loss(terms, features, progress=progress)
    gap = (features.image.mean(dim=0) - features.text.mean(dim=0)).norm().detach()
    scale = features.logit_scale.detach()[0]
    statistics = {**result.statistics, "modality_gap": gap, "logit_scale": scale}
    return LossOutput(total=result.total, statistics=statistics)
