"""The rank of the right answer among all answers, in tiles: the one core of every top-k figure.

Similarities are never held as one matrix. Ties go to the answer that comes first, so results do
not depend on the tile, the library's sort, or the number of ranks.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

__all__ = ["best_positive_ranks", "top_matches"]

_TILE = 4096
_TOP_ROWS = 256


def best_positive_ranks(
    queries: Float[Tensor, "query dim"],
    gallery: Float[Tensor, "item dim"],
    query_groups: Int64[Tensor, " query"],
    gallery_groups: Int64[Tensor, " item"],
    *,
    tile: int = _TILE,
) -> Int64[Tensor, " query"]:
    """For each query the rank, from 0, of its best-placed positive.

    An item is a positive of a query if their groups are equal. Among equal similarities the item
    with the lower index comes first.

    Args:
        queries: Unit rows.
        gallery: Unit rows.
        query_groups: Of each query.
        gallery_groups: Of each item.
        tile: Rows and columns of similarities held at a time.

    Raises:
        ValueError: If a query has no positive at all.
    """
    ranks = [
        _ranks(queries[i : i + tile], gallery, query_groups[i : i + tile], gallery_groups, tile)
        for i in range(0, len(queries), tile)
    ]
    return torch.cat(ranks) if ranks else torch.empty(0, dtype=torch.int64)


def top_matches(
    queries: Float[Tensor, "query dim"], gallery: Float[Tensor, "item dim"], k: int
) -> Int64[Tensor, "query k"]:
    """Indices of the `k` most similar items of each query, best first, ties by index."""
    items = gallery.double().T
    found = [
        (part.double() @ items).float().sort(dim=1, descending=True, stable=True).indices[:, :k]
        for part in queries.split(_TOP_ROWS)
    ]
    return torch.cat(found)


def _ranks(
    queries: Float[Tensor, "query dim"],
    gallery: Float[Tensor, "item dim"],
    query_groups: Int64[Tensor, " query"],
    gallery_groups: Int64[Tensor, " item"],
    tile: int,
) -> Int64[Tensor, " query"]:
    best, best_index = _best_positive(queries, gallery, query_groups, gallery_groups, tile)
    ranks = torch.zeros(len(queries), dtype=torch.int64)
    for start, similarities, _ in _tiles(queries, gallery, query_groups, gallery_groups, tile):
        indices = torch.arange(start, start + similarities.shape[1])
        before = similarities > best[:, None]
        before |= (similarities == best[:, None]) & (indices < best_index[:, None])
        ranks += before.sum(dim=1)
    return ranks


def _best_positive(
    queries: Float[Tensor, "query dim"],
    gallery: Float[Tensor, "item dim"],
    query_groups: Int64[Tensor, " query"],
    gallery_groups: Int64[Tensor, " item"],
    tile: int,
) -> tuple[Float[Tensor, " query"], Int64[Tensor, " query"]]:
    """Similarity and index of each query's most similar positive, the first one among equals."""
    best = torch.full((len(queries),), -torch.inf)
    best_index = torch.full((len(queries),), -1, dtype=torch.int64)
    for start, similarities, positive in _tiles(
        queries, gallery, query_groups, gallery_groups, tile
    ):
        values, columns = similarities.masked_fill(~positive, -torch.inf).max(dim=1)
        # max may return any of equal columns; the first is wanted.
        first = (similarities.eq(values[:, None]) & positive).int().argmax(dim=1)
        columns = torch.where(values > -torch.inf, first, columns)
        better = values > best
        best = torch.where(better, values, best)
        best_index = torch.where(better, columns + start, best_index)
    if bool((best_index < 0).any()):
        lost = int((best_index < 0).sum())
        message = f"{lost} of {len(queries)} queries have no positive in the gallery"
        raise ValueError(message)
    return best, best_index


def _tiles(
    queries: Float[Tensor, "query dim"],
    gallery: Float[Tensor, "item dim"],
    query_groups: Int64[Tensor, " query"],
    gallery_groups: Int64[Tensor, " item"],
    tile: int,
) -> Iterator[tuple[int, Float[Tensor, "query tile"], Bool[Tensor, "query tile"]]]:
    """Start, similarities and positives of one stretch of the gallery after the other."""
    for start in range(0, len(gallery), tile):
        # fp32 products differ in the last bit with the shape of the tile; fp64 rounded to fp32
        # does not, so ties stay ties however the gallery is cut.
        similarities = (queries.double() @ gallery[start : start + tile].double().T).float()
        positive = query_groups[:, None] == gallery_groups[None, start : start + tile]
        yield start, similarities, positive
