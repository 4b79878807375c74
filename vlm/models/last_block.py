"""The last block of a transformer, computed for the one position that is read out.

A tower reads out one row, the class token's or the end mark's. In the last block every other
position matters only as a key and a value; its query, its projection and its MLP are work for
nothing: 5/6 of a block's products, 7% of a tower of 12 blocks. Rows stay equal up to rounding.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["LastBlock", "read_out_one_position", "reads_end_mark", "run_to_position"]


class LastBlock(nn.Module):
    """A `ResidualAttentionBlock` of open_clip's, with its modules under their names.

    Args:
        block: Gives its modules.
        position: Read out: 0 or -1; none where each call may say.
    """

    ln_1: nn.Module
    attn: nn.MultiheadAttention
    ls_1: nn.Module
    ln_2: nn.Module
    mlp: nn.Module
    ls_2: nn.Module

    def __init__(self, block: nn.Module, *, position: int | None) -> None:
        super().__init__()
        self._place = None if position is None else slice(position, position + 1 or None)
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(
        self,
        rows: Float[Tensor, "batch position width"],
        _keys: None = None,
        _values: None = None,
        attn_mask: Float[Tensor, "position position"] | None = None,
        positions: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch read width"]:
        """The row at the position that is read out; all, where nobody says which that is.

        Args:
            rows: All positions; arguments are in the order in which open_clip's transformer
                gives them.
            attn_mask: Added to the logits of attention.
            positions: Where each sample is read out, where the block was not made for one place.
        """
        normed = self.ln_1(rows)
        if positions is None:
            place = slice(None) if self._place is None else self._place
            row, query = rows[:, place], normed[:, place]
            mask = None if attn_mask is None else attn_mask[place]
        else:
            row, query = _at(rows, positions), _at(normed, positions)
            mask = None if attn_mask is None else self._for_heads(attn_mask[positions])
        mask = None if mask is None else mask.to(query.dtype)
        row = row + self.ls_1(
            self.attn(query, normed, normed, need_weights=False, attn_mask=mask)[0]
        )
        return row + self.ls_2(self.mlp(self.ln_2(row)))

    def get_weight_dtype(self) -> torch.dtype:
        """What open_clip's towers ask their first block, which may be the last."""
        return next(self.mlp.parameters()).dtype

    def _for_heads(self, seen: Tensor) -> Tensor:
        """[batch memory] -> [batch * head 1 memory], as torch's attention asks for."""
        return seen[:, None].expand(-1, self.attn.num_heads, -1).flatten(0, 1)[:, None]


def _at(rows: Tensor, positions: Tensor) -> Tensor:
    """[batch position width] -> [batch 1 width]."""
    return rows.gather(1, positions[:, None, None].expand(-1, 1, rows.shape[2]))


def read_out_one_position(tower: nn.Module) -> None:
    """Give a tower of open_clip's a `LastBlock`, where it reads out one position; else nothing."""
    from open_clip.transformer import (  # noqa: PLC0415 - seconds, only builders pay
        ResidualAttentionBlock,
        TextTransformer,
        VisionTransformer,
    )

    match tower:
        case VisionTransformer(attn_pool=None, pool_type="tok", output_tokens=False):
            position: int | None = 0
        case TextTransformer() if reads_end_mark(tower):
            position = None
        case TextTransformer(
            cls_emb=None, output_tokens=False, use_pad_mask=False, pool_type="first" | "last"
        ):
            position = 0 if tower.pool_type == "first" else -1
        case _:
            return
    transformer: Any = tower.transformer
    if type(transformer.resblocks[-1]) is ResidualAttentionBlock and transformer.batch_first:
        transformer.resblocks[-1] = LastBlock(transformer.resblocks[-1], position=position)


def reads_end_mark(tower: Any) -> bool:
    """Whether nothing behind the end mark, the highest token id, matters to a text tower."""
    causal = getattr(tower, "attn_mask", None) is not None and tower.cls_emb is None
    return (
        causal
        and tower.pool_type == "argmax"
        and not tower.use_pad_mask
        and not tower.output_tokens
    )


def run_to_position(
    transformer: Any,
    rows: Float[Tensor, "batch position width"],
    mask: Float[Tensor, "position position"],
    positions: Int64[Tensor, " batch"],
) -> Float[Tensor, "batch width"]:
    """Run a transformer of open_clip's; the row of each sample at its position."""
    *blocks, last = transformer.resblocks
    if not isinstance(last, LastBlock):
        rows = transformer(rows, attn_mask=mask)
        return _at(rows, positions)[:, 0]
    for block in blocks:
        rows = _run(transformer, block, rows, mask)
    return _run(transformer, last, rows, mask, positions)[:, 0]


def _run(transformer: Any, block: nn.Module, rows: Tensor, mask: Tensor, *more: Tensor) -> Tensor:
    arguments = (rows, None, None, mask, *more)
    if not transformer.grad_checkpointing:
        result: Tensor = block(*arguments)
        return result
    again: Tensor = checkpoint(block, *arguments, use_reentrant=False)
    return again
