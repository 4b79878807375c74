"""What contrastive terms report beside their value; linear in the batch, so that it is free."""

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.losses.pairs import Pairs, Similar, group_sizes, group_sums, num_left_out
from vlm.types import Features

__all__ = ["Statistics", "contrastive_statistics"]

Statistics = dict[str, Float[Tensor, ""]]

_MAX_ANCHORS = 256


@torch.no_grad()
def contrastive_statistics(features: Features, similar: tuple[Similar, ...] = ()) -> Statistics:
    """Temperature, mean similarities, and how many negatives really push.

    Keys: `temperature`; `positive_similarity`, the mean cosine of matches; `same_group_fraction`,
    the share of pairs off the diagonal that are no negatives; with `similar`, `masked_fraction`,
    the share that a teacher's mask takes beside them; and, where every row has at least
    two negatives, `negative_similarity`, their mean cosine, and `negative_entropy`.
    """
    num_rows = len(features.image)
    sizes = group_sizes(features.group_ids)
    num_same = sizes.sum()
    positive = (features.image * features.text).sum(dim=1)
    off_diagonal = max(num_rows * (num_rows - 1), 1)
    statistics = {
        "temperature": 1 / features.logit_scale[0],
        "positive_similarity": positive.mean(),
        "same_group_fraction": (num_same - num_rows) / off_diagonal,
    }
    if similar:
        groups = features.group_ids
        pairs = Pairs(similar=similar, row_groups=groups, column_groups=groups)
        masked = num_left_out(pairs, num_rows, num_rows, groups.device, share=features.share).sum()
        statistics["masked_fraction"] = masked / off_diagonal
    if int(sizes.max()) <= num_rows - 2:
        # A sum of cosines is the dot product of two sums: no pair of rows has to be formed.
        every = (features.image.sum(dim=0) * features.text.sum(dim=0)).sum()
        same = (features.image * group_sums(features.text, features.group_ids)).sum()
        statistics["negative_similarity"] = (every - same) / (num_rows**2 - num_same)
        statistics["negative_entropy"] = _negative_entropy(features)
    return statistics


def _negative_entropy(features: Features) -> Float[Tensor, ""]:
    """Entropy of the softmax over an image's negatives, as a fraction of its largest value.

    1 means that all negatives push alike, 0 that a single one does. A mean over all images, or
    over an even sample of 256 of a larger batch.

    Source: the relative penalty r of Wang & Liu 2020 (arXiv:2012.09740).
    """
    stride = -(-len(features.image) // _MAX_ANCHORS)
    image, group_ids = features.image[::stride], features.group_ids[::stride]
    num_anchors = len(image)
    own = features.share.own(num_anchors)
    image, group_ids = image[own], group_ids[own]
    same = group_ids[:, None] == features.group_ids[None, :]  # [own_anchors global_batch]
    logits = (features.logit_scale * image) @ features.text.T
    shares = logits.masked_fill(same, -torch.inf).softmax(dim=1)
    largest = (~same).sum(dim=1).log()
    entropy = torch.special.entr(shares).sum(dim=1) / largest
    return (features.share.total(entropy.sum()) / num_anchors).clamp(0.0, 1.0)
