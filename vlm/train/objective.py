"""From one rank's embeddings to the loss of the global batch.

Features are gathered once, with gradient, for all terms; every rank then computes the same global
loss, which makes W ranks on B/W samples each equal to one process on B, for any sum of terms.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from vlm.distributed import World, gather_rows, gather_rows_with_gradient
from vlm.losses import LossTerm, total_loss
from vlm.types import DualEncoderOutput, Features, LossOutput

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

    Of several views of the images each gives a loss with the captions, and the total is their mean.

    Args:
        output: This rank's embeddings, logit scale and bias.
        group_ids: This rank's groups; equal groups are never negatives of each other.
        terms: The loss, as configured.
        progress: Fraction of training done, in [0, 1]; drives weight schedules.
        world: The ranks. All must bring equally many rows.

    Returns:
        The total and its statistics, with `modality_gap` (distance between the centroids of the
        two modalities, 0 to 2) and `logit_scale` beside those of the terms, all of the first view.
    """
    own = [output.text, output.image, *output.more_images]
    # All in one message, [batch len(own)*dim].
    gathered = gather_rows_with_gradient(torch.cat(own, dim=1).float(), world)
    text, *views = gathered.chunk(len(own), dim=1)
    scale = output.logit_scale.float()
    bias = None if output.logit_bias is None else output.logit_bias.float()
    groups = gather_rows(group_ids, world)
    results = [
        total_loss(
            terms,
            Features(image=image, text=text, logit_scale=scale, logit_bias=bias, group_ids=groups),
            progress=progress,
        )
        for image in views
    ]
    gap = (views[0].mean(dim=0) - text.mean(dim=0)).norm().detach()
    statistics = {
        **results[0].statistics,
        "modality_gap": gap,
        "logit_scale": scale.detach()[0],
    }
    total = torch.stack([result.total for result in results]).mean()
    return LossOutput(total=total, statistics=statistics)
