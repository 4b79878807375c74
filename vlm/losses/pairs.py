"""Which pairs take part in a loss, and sums over groups of rows that show the same thing."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vlm.types import WHOLE, RowShare

__all__ = [
    "NoPairsError",
    "Pairs",
    "Similar",
    "group_sizes",
    "group_sums",
    "negative_pairs",
    "num_left_out",
]


class NoPairsError(ValueError):
    """All rows of a batch show the same thing, so that a loss has nothing to tell apart."""


@dataclass(frozen=True, kw_only=True)
class Similar:
    """Pairs whose features, a frozen teacher's, have a cosine over a threshold."""

    rows: Float[Tensor, "batch width"]
    """Unit rows, as are `columns`."""
    columns: Float[Tensor, "global_batch width"]
    above: float
    """In [-1, 1]."""

    def mask(self, rows: slice, columns: slice) -> Bool[Tensor, "batch global_batch"]:
        with torch.autocast(self.rows.device.type, enabled=False):
            return self.rows[rows] @ self.columns[columns].T > self.above


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which pairs of a row and a column a reduction leaves out; none by default.

    Row i matches column `first_row + i`, so the rows may be one part of the columns' batch.
    """

    left_out: Literal["none", "match", "group", "others_of_group"] = "none"
    """`match`: row i with its own column. `group`: all of one group, the match with them.
    `others_of_group`: all of one group but the match."""
    row_groups: Int64[Tensor, " batch"] | None = None
    column_groups: Int64[Tensor, " global_batch"] | None = None
    first_row: int = 0
    similar: tuple[Similar, ...] = ()
    """Left out besides, as likely false negatives; never a match or, with groups, one of them."""

    def mask(
        self, rows: slice, columns: slice, device: torch.device
    ) -> Bool[Tensor, "batch global_batch"] | None:
        """True where a pair of this tile is left out; nothing if none is."""
        if self.left_out == "none" and not self.similar:
            return None
        match = self._match(rows, columns, device)
        left_out = self._by_rule(rows, columns, match)
        for similar in self.similar:
            near = similar.mask(rows, columns)
            if match is not None:
                near &= ~match
            if self.row_groups is not None and self.column_groups is not None:
                near &= self.row_groups[rows, None] != self.column_groups[None, columns]
            left_out = near if left_out is None else left_out | near
        return left_out

    def _match(
        self, rows: slice, columns: slice, device: torch.device
    ) -> Bool[Tensor, "batch global_batch"] | None:
        """True on the diagonal; none where the tile does not meet it."""
        start, stop = rows.start + self.first_row, rows.stop + self.first_row
        if start >= columns.stop or columns.start >= stop:
            return None
        row_places = torch.arange(start, stop, device=device)
        column_places = torch.arange(columns.start, columns.stop, device=device)
        return row_places[:, None] == column_places[None, :]

    def _by_rule(
        self, rows: slice, columns: slice, match: Bool[Tensor, "batch global_batch"] | None
    ) -> Bool[Tensor, "batch global_batch"] | None:
        if self.left_out == "none":
            return None
        if self.left_out == "match":
            return match
        if self.row_groups is None or self.column_groups is None:
            message = f"left_out={self.left_out!r} needs row_groups and column_groups, got none"
            raise ValueError(message)
        same = self.row_groups[rows, None] == self.column_groups[None, columns]
        return same & ~match if self.left_out == "others_of_group" and match is not None else same


def negative_pairs(
    group_ids: Int64[Tensor, " batch"] | None, similar: tuple[Similar, ...] = ()
) -> Pairs:
    """The pairs of a batch with itself that do not show the same thing."""
    if group_ids is None:
        return Pairs(left_out="match", similar=similar)
    return Pairs(left_out="group", row_groups=group_ids, column_groups=group_ids, similar=similar)


def num_left_out(
    pairs: Pairs,
    num_rows: int,
    num_columns: int,
    device: torch.device,
    *,
    share: RowShare = WHOLE,
    tile: int = 1024,
) -> Int64[Tensor, " batch"]:
    """For each row, how many columns it is not paired with."""
    counts = torch.zeros(num_rows, dtype=torch.int64, device=device)
    own = share.own(num_rows)
    for row in range(own.start, own.stop, tile):
        rows = slice(row, min(row + tile, own.stop))
        for column in range(0, num_columns, tile):
            mask = pairs.mask(rows, slice(column, min(column + tile, num_columns)), device)
            if mask is not None:
                counts[rows] += mask.sum(dim=1)
    return share.total(counts)


def group_sizes(group_ids: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
    """For each row, how many rows its group has, itself included."""
    _, inverse, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return counts[inverse]


def group_sums(
    features: Float[Tensor, "batch dim"], group_ids: Int64[Tensor, " batch"]
) -> Float[Tensor, "batch dim"]:
    """For each row, the sum of the features of its group, itself included.

    The similarities of a row to its whole group then take one dot product, and no pair of rows.
    """
    unique, inverse = torch.unique(group_ids, return_inverse=True)
    sums = features.new_zeros(len(unique), features.shape[1]).index_add(0, inverse, features)
    return sums[inverse]
