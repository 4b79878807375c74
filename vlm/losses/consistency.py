"""Terms that make the two modalities agree about distances: those of CyCLIP."""

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.losses.precision import full_precision
from vlm.types import WHOLE, RowShare

__all__ = ["cyclic_consistency"]


def cyclic_consistency(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    *,
    share: RowShare = WHOLE,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""In-modal and cross-modal consistency, each at least 0 up to rounding.

    $$\tfrac1B \sum_{ij} (I_i \cdot I_j - T_i \cdot T_j)^2 \quad\text{and}\quad
      \tfrac1B \sum_{ij} (I_i \cdot T_j - I_j \cdot T_i)^2$$

    No pair is ever formed: with P = I - T and Q = I + T the two matrices under the squares are
    half of P Q' + Q P' and of P Q' - Q P', so their sums are half of <P'P, Q'Q> + tr (P'Q)^2 and
    of the same with a minus. That takes dim x dim numbers and B dim^2 products. In float32 each
    value is exact to about 1e-6 of the sum of both. With a `share`, each process sums over its own
    rows, and dim x dim numbers are sent.

    Source: L_I-Cyclic and L_C-Cyclic of Goel et al. 2022 (arXiv:2205.14459), whose published
    weights are 0.25 each beside the loss of CLIP.
    """
    image, text = full_precision(image), full_precision(text)
    apart, together = image - text, image + text
    own = share.own(len(image))
    apart, together = apart[own], together[own]
    grams = torch.stack([apart.T @ apart, together.T @ together, apart.T @ together])
    of_apart, of_together, mixed = share.total(grams)  # [dim dim] each
    squares = (of_apart * of_together).sum()
    traces = (mixed * mixed.T).sum()
    return (squares + traces) / (2 * len(image)), (squares - traces) / (2 * len(image))
