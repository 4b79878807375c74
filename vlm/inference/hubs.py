"""Hubs: items that are near to every query, whatever it asks for."""

from typing import Final

import numpy as np
from jaxtyping import Float, Shaped

__all__ = ["HUB_CANDIDATES", "HUB_SHARPNESS", "crowding"]

HUB_SHARPNESS: Final = 20.0
"""Inverse temperature of the inverted softmax."""
HUB_CANDIDATES: Final = 100
"""Of the nearest items, how many are put into a new order at least."""


def crowding(
    rows: Shaped[np.ndarray, "item dim"], bank: Shaped[np.ndarray, "query dim"]
) -> Float[np.ndarray, " item"]:
    """How near items are to a bank of queries: log of the sum of exp(20 cosine) over the bank.

    An item's place by 20 cosine less this is that by QB-Norm's inverted softmax.

    Args:
        rows: Unit rows of the items.
        bank: Unit rows of queries as they are asked, at least one.

    Source: the normalising sum of Bogolin et al. 2022 (arXiv:2112.12777), section 3.2.
    """
    crowds = HUB_SHARPNESS * (bank @ rows.T).astype(np.float64)  # [query item]
    top = crowds.max(axis=0)
    return np.log(np.exp(crowds - top).sum(axis=0)) + top
