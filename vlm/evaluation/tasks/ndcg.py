"""How high the right answers are among the first ten."""

from typing import Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["FIRST", "ndcg", "sizes"]

FIRST: Final = 10


def ndcg(relevant: Tensor, num_relevant: Int64[Tensor, " query"]) -> Float[Tensor, " query"]:
    """Normalised discounted cumulative gain of each query, with gains 0 and 1.

    Args:
        relevant: Whether the item at each place, best first, is a right answer; [query place].
        num_relevant: How many right answers there are in all.

    Source: DCG with the discount 1 / log2(place + 1), over that of the best order (Järvelin &
        Kekäläinen 2002).
    """
    places = relevant.shape[1]
    discounts = 1 / torch.log2(torch.arange(places, dtype=torch.float64) + 2)
    best = torch.cat([torch.zeros(1, dtype=torch.float64), discounts.cumsum(dim=0)])
    return (relevant.double() * discounts).sum(dim=1) / best[num_relevant.clamp(max=places)]


def sizes(groups: Int64[Tensor, " sample"]) -> Int64[Tensor, " sample"]:
    """How many samples each sample's group has."""
    _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    return counts[inverse]
