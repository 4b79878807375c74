"""Weights of another resolution or context length, made to fit a model.

Position embeddings of images lie on a grid and are resized as an image is, bicubic and antialiased;
tokens that are no place, like [CLS], keep theirs. Those of texts are cut at the end, or go on with
the fresh ones of the model.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["fit_positions", "resize_grid"]

_IMAGE = ("positional_embedding", "attnpool.positional_embedding", "trunk.pos_embed")
_TEXT = ("positional_embedding",)


def resize_grid(
    positions: Float[Tensor, "place width"], num_places: int, *, extra: int
) -> Float[Tensor, "new_place width"]:
    """Position embeddings of a square grid, resized to that of `num_places` in all.

    Args:
        positions: `extra` tokens that are no place, then the grid by rows.
        num_places: The new count, `extra` included.
        extra: How many tokens before the grid.

    Raises:
        ValueError: If a grid is not square.
    """
    old, new = (math.isqrt(count - extra) for count in (len(positions), num_places))
    if (old * old, new * new) != (len(positions) - extra, num_places - extra):
        message = f"{len(positions)} and {num_places} positions with {extra} extra: no square grids"
        raise ValueError(message)
    grid = positions[extra:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:extra], grid.flatten(2)[0].T])


def fit_positions(tower: nn.Module, state: dict[str, Tensor], *, text: bool) -> dict[str, Tensor]:
    """The same weights, with position embeddings of the tower's own size.

    Args:
        tower: The module that the weights are for.
        state: Named as in the tower.
        text: Whether positions are those of a text.

    Raises:
        ValueError: If positions lie on no square grid.
    """
    fitted = dict(state)
    own = tower.state_dict()
    for name in _TEXT if text else _IMAGE:
        if name not in state or name not in own or state[name].shape == own[name].shape:
            continue
        old, new = state[name].float(), own[name]
        if old.shape[-1] != new.shape[-1]:
            continue  # of another model, which whoever loads it will say
        if text:
            kept = min(len(old), len(new))
            fitted[name] = torch.cat([old[:kept], new[kept:].to(old)])
        else:
            rows = resize_grid(
                old.reshape(-1, old.shape[-1]), new.numel() // new.shape[-1], extra=_extra(tower)
            )
            fitted[name] = rows.reshape(new.shape)
    return fitted


def _extra(tower: nn.Module) -> int:
    """Positions before the grid: of a class token, or of the mean that CLIP's ResNet pools with."""
    trunk = getattr(tower, "trunk", None)
    if trunk is not None:
        return 0 if getattr(trunk, "no_embed_class", False) else int(trunk.num_prefix_tokens)
    return int(hasattr(tower, "class_embedding") or hasattr(tower, "attnpool"))
