"""Transformer blocks that can go on where they stopped: attention, poolers, keys and values kept.

Plain modules round `F.scaled_dot_product_attention`. What a block has to remember of earlier
positions is a value that goes in and comes out, so a cached decoder is the same code as a training
one, and picking rows of a batch, as beams do, is picking rows of tensors.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Attention", "AttentionalPooler", "Block", "KeysValues", "causal_mask", "run_block"]


@dataclass(frozen=True, kw_only=True)
class KeysValues:
    """What queries attend to: one layer's keys and values."""

    keys: Float[Tensor, "batch head memory head_width"]
    values: Float[Tensor, "batch head memory head_width"]

    def after(self, past: "KeysValues | None") -> "KeysValues":
        """These behind those of earlier positions."""
        if past is None:
            return self
        return KeysValues(
            keys=torch.cat([past.keys, self.keys], dim=2),
            values=torch.cat([past.values, self.values], dim=2),
        )

    def rows(self, index: Int64[Tensor, " picked"]) -> "KeysValues":
        return KeysValues(keys=self.keys[index], values=self.values[index])


class Attention(nn.Module):
    """Multi-head attention of `width`, to rows of `memory_width` (as wide, by default).

    Raises:
        ValueError: If the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, *, memory_width: int | None = None) -> None:
        super().__init__()
        if width % heads:
            message = f"width {width} does not divide over {heads} heads"
            raise ValueError(message)
        self._heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(memory_width or width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, memory: Float[Tensor, "batch memory memory_width"]) -> KeysValues:
        keys, values = self.key_value(memory).chunk(2, dim=-1)
        return KeysValues(keys=self._split(keys), values=self._split(values))

    def forward(
        self,
        rows: Float[Tensor, "batch position width"],
        attended: KeysValues,
        mask: Bool[Tensor, "... position memory"] | None = None,
    ) -> Float[Tensor, "batch position width"]:
        """Attend where `mask` is true; everywhere without one."""
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(rows)), attended.keys, attended.values, attn_mask=mask
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self._heads, -1)).transpose(1, 2)  # [batch head position width]


class Block(nn.Module):
    """Pre-norm self-attention, cross-attention where `memory_width` is given, and a GELU MLP."""

    def __init__(
        self, width: int, heads: int, *, mlp_ratio: float = 4.0, memory_width: int | None = None
    ) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.cross_norm = None if memory_width is None else nn.LayerNorm(width)
        self.cross_attention = (
            None if memory_width is None else Attention(width, heads, memory_width=memory_width)
        )
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self,
        rows: Float[Tensor, "batch position width"],
        *,
        mask: Bool[Tensor, "... position memory"] | None = None,
        past: KeysValues | None = None,
        memory: KeysValues | None = None,
    ) -> tuple[Float[Tensor, "batch position width"], KeysValues]:
        """The rows after this block, and its keys and values so far.

        Args:
            rows: New positions.
            mask: Where they may look, over past and new positions.
            past: Keys and values of earlier positions, from earlier calls.
            memory: What `memory_of` made of the rows to cross-attend to.
        """
        normed = self.norm(rows)
        seen = self.attention.keys_values(normed).after(past)
        rows = rows + self.attention(normed, seen, mask)
        if self.cross_attention is not None and self.cross_norm is not None:
            assert memory is not None
            rows = rows + self.cross_attention(self.cross_norm(rows), memory)
        return rows + self.mlp(self.mlp_norm(rows)), seen

    def memory_of(self, rows: Float[Tensor, "batch memory memory_width"]) -> KeysValues:
        """Keys and values of the rows to cross-attend to; for blocks with cross-attention."""
        assert self.cross_attention is not None
        return self.cross_attention.keys_values(rows)


def run_block(
    block: nn.Module,
    rows: Float[Tensor, "batch position width"],
    *,
    mask: Bool[Tensor, "... position memory"] | None = None,
    image: Float[Tensor, "batch place image_width"] | None = None,
    recompute: bool,
) -> Float[Tensor, "batch position width"]:
    """A `Block` over whole sequences, where nobody needs its keys and values.

    Args:
        block: The block.
        rows: All positions.
        mask: Where they may look.
        image: What a block with cross-attention looks at.
        recompute: Keep nothing but what goes in, and compute the block again in backward.
    """

    def computed(rows: Tensor, image: Tensor | None) -> Tensor:
        assert isinstance(block, Block)
        memory = None if image is None else block.memory_of(image)
        result: Tensor = block(rows, mask=mask, memory=memory)[0]
        return result

    if not recompute:
        return computed(rows, image)
    again: Tensor = checkpoint(computed, rows, image, use_reentrant=False)
    return again


class AttentionalPooler(nn.Module):
    """One attention layer whose queries are learnt: any number of rows in, `num_queries` out.

    Source: section 3.2 of CoCa (arXiv:2205.01917). Inputs and outputs are layer-normed.
    """

    def __init__(self, num_queries: int, width: int, heads: int, *, memory_width: int) -> None:
        super().__init__()
        self.query_embedding = nn.Parameter(torch.randn(num_queries, width) / math.sqrt(width))
        self.norm = nn.LayerNorm(memory_width)
        self.attention = Attention(width, heads, memory_width=memory_width)
        self.out_norm = nn.LayerNorm(width)

    def forward(
        self, rows: Float[Tensor, "batch memory memory_width"]
    ) -> Float[Tensor, "batch query width"]:
        queries = self.query_embedding.expand(len(rows), -1, -1)
        return self.out_norm(
            self.attention(queries, self.attention.keys_values(self.norm(rows)), None)
        )


def causal_mask(
    positions: int, *, past: int, device: torch.device
) -> Bool[Tensor, "position memory"] | None:
    """Each new position sees all past ones, itself and new ones before it; none if it is one."""
    if positions == 1:
        return None
    allowed = torch.ones(positions, past + positions, dtype=torch.bool, device=device)
    return allowed.tril(past)
