"""The rank of the right answer among all answers, in tiles: the one core of every top-k figure.

Similarities are never held as one matrix, and they are exact (see `exact.py`): no tile, number of
ranks or library changes a result. Among equal similarities the item with the lower index comes
first.
"""

from typing import Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.distributed import World, gather_uneven_rows, sum_over_ranks
from vlm.evaluation.exact import over_rows, rank_range, whole_rows

__all__ = ["best_positive_ranks", "paired_ranks", "top_matches"]

_TILE: Final = 1024
_PAIRS_AT_ONCE: Final = 8192

Rows = Float[Tensor, "row dim"]
Groups = Int64[Tensor, " row"]


def best_positive_ranks(
    queries: Rows,
    gallery: Float[Tensor, "item dim"],
    query_groups: Groups,
    gallery_groups: Int64[Tensor, " item"],
    world: World | None = None,
    *,
    tile: int = _TILE,
) -> Int64[Tensor, " row"]:
    """For each query the rank, from 0, of its best-placed positive.

    An item is a positive of a query if their groups are equal.

    Args:
        queries: Unit rows.
        gallery: Unit rows.
        query_groups: Of each query.
        gallery_groups: Of each item.
        world: The ranks that share the queries; every one holds all rows.
        tile: Rows and columns of similarities held at a time.

    Raises:
        ValueError: If a query has no positive at all.
    """
    if len(queries) == 0:
        return torch.empty(0, dtype=torch.int64)
    best, first = _best_positives(queries, gallery, query_groups, gallery_groups)

    def ranks(start: int, stop: int) -> Int64[Tensor, " query"]:
        left, found = whole_rows(queries[start:stop]), torch.zeros(stop - start, dtype=torch.int64)
        for begin in range(0, len(gallery), tile):
            similarities = left @ whole_rows(gallery[begin : begin + tile]).T
            found += _before(similarities, best[start:stop], first[start:stop] - begin)
        return found

    return over_rows(len(queries), world or World(), ranks, at_once=tile)


def paired_ranks(
    images: Rows,
    texts: Float[Tensor, "text dim"],
    image_groups: Groups,
    text_groups: Int64[Tensor, " text"],
    world: World | None = None,
    *,
    tile: int = _TILE,
) -> tuple[Int64[Tensor, " row"], Int64[Tensor, " text"]]:
    """`best_positive_ranks` of images among texts and of texts among images, in one pass.

    Each similarity is computed once and counts in both directions.

    Raises:
        ValueError: If an image or a text has no positive at all.
    """
    world = world or World()
    image_best, image_first = _best_positives(images, texts, image_groups, text_groups)
    text_best, text_first = _best_positives(texts, images, text_groups, image_groups)
    text_ranks = torch.zeros(len(texts), dtype=torch.int64)

    def ranks(start: int, stop: int) -> Int64[Tensor, " image"]:
        left, found = whole_rows(images[start:stop]), torch.zeros(stop - start, dtype=torch.int64)
        for begin in range(0, len(texts), tile):
            end = min(begin + tile, len(texts))
            similarities = left @ whole_rows(texts[begin:end]).T
            found += _before(similarities, image_best[start:stop], image_first[start:stop] - begin)
            text_ranks[begin:end] += _before(
                similarities.T, text_best[begin:end], text_first[begin:end] - start
            )
        return found

    own = [
        ranks(start, min(start + tile, len(images)))
        for start in rank_range(len(images), world, at_once=tile)
    ]
    image_ranks = gather_uneven_rows(torch.cat([torch.empty(0, dtype=torch.int64), *own]), world)
    return image_ranks, sum_over_ranks(text_ranks.to(world.device), world).cpu()


def top_matches(
    queries: Rows, gallery: Float[Tensor, "item dim"], k: int, world: World | None = None
) -> Int64[Tensor, "row k"]:
    """Indices of the `k` most similar items of each query, best first, ties by index.

    All items are returned where there are fewer than `k`.
    """
    items, k = whole_rows(gallery).T, min(k, len(gallery))
    if len(queries) == 0:
        return torch.empty((0, k), dtype=torch.int64)
    return over_rows(
        len(queries),
        world or World(),
        lambda start, stop: _top(whole_rows(queries[start:stop]) @ items, k),
        at_once=256,
    )


def _top(similarities: Float[Tensor, "query item"], k: int) -> Int64[Tensor, "query k"]:
    """The sort of torch's own top-k says nothing about ties: only its k-th value is used."""
    last = similarities.topk(k, dim=1).values[:, -1:]
    above, equal = similarities > last, similarities == last
    taken = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    indices = taken.nonzero()[:, 1].reshape(-1, k)
    order = similarities.gather(1, indices).sort(dim=1, descending=True, stable=True).indices
    return indices.gather(1, order)


def _before(
    similarities: Float[Tensor, "query item"],
    best: Float[Tensor, " query"],
    first: Int64[Tensor, " query"],
) -> Int64[Tensor, " query"]:
    """How many items of a tile come before each query's best positive.

    Args:
        similarities: Whole numbers.
        best: Similarity of the best positive.
        first: Its index, relative to the first item of the tile.
    """
    items = similarities.shape[1]
    # Before the positive an equal item counts too, after it only a greater one.
    least = torch.where(first >= items, best, best + 1)
    counts = (similarities >= least[:, None]).sum(dim=1)
    inside = ((first > 0) & (first < items)).nonzero().flatten()
    if len(inside):
        equal = similarities[inside] == best[inside, None]
        counts[inside] += (equal & (torch.arange(items) < first[inside, None])).sum(dim=1)
    return counts


def _best_positives(
    queries: Rows,
    gallery: Float[Tensor, "item dim"],
    query_groups: Groups,
    gallery_groups: Int64[Tensor, " item"],
) -> tuple[Float[Tensor, " row"], Int64[Tensor, " row"]]:
    """Similarity and index of each query's most similar positive, the first one among equals.

    Only positive pairs are multiplied: being exact, they equal those of the tiles.
    """
    order = gallery_groups.argsort(stable=True)
    ordered = gallery_groups[order].contiguous()
    starts = torch.searchsorted(ordered, query_groups)
    counts = torch.searchsorted(ordered, query_groups, right=True) - starts
    if bool((counts == 0).any()):
        lost = int((counts == 0).sum())
        message = f"{lost} of {len(queries)} queries have no positive in the gallery"
        raise ValueError(message)
    best = torch.full((len(queries),), -torch.inf, dtype=torch.float64)
    index = torch.full((len(queries),), -1, dtype=torch.int64)
    # The n-th positive of every query that has so many; in order of index, so the first wins.
    for number in range(int(counts.max()) if len(queries) else 0):
        for rows in (counts > number).nonzero().flatten().split(_PAIRS_AT_ONCE):
            items = order[starts[rows] + number]
            products = (whole_rows(queries[rows]) * whole_rows(gallery[items])).sum(dim=1)
            better = products > best[rows]
            best[rows[better]], index[rows[better]] = products[better], items[better]
    return best, index
