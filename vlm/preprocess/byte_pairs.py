"""Byte-pair encoding of a word, in n log n.

open_clip's looks at all pairs again for each merge. That takes a second for a word of 2,000
letters, so a few requests with such words would hold a server up.

Source: Sennrich et al. 2016 (arXiv:1508.07909, algorithm 1).
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["merged_pieces"]

Ranks = Mapping[tuple[str, str], int]


def merged_pieces(ranks: Ranks, letters: Sequence[str]) -> list[str]:
    """The pieces of a word, equal to those of open_clip's tokenizer.

    Again and again all pairs of the lowest rank are merged, from the left.

    Args:
        ranks: Of pairs of pieces, in the order in which they are merged.
        letters: At least one; the last gets the end mark of words.
    """
    word = _Word(ranks, letters)
    heap = word.pairs(range(len(letters)))
    heapq.heapify(heap)
    while heap:
        lowest = heap[0][0]
        grown = []
        while heap and heap[0][0] == lowest:  # before any pair that they make, whatever its rank
            left = heapq.heappop(heap)[1]
            if word.rank(left) == lowest:  # else one of the two was merged with another meanwhile
                word.merge(left)
                grown.append(left)
        for pair in word.pairs(n for left in grown for n in (word.before[left], left)):
            heapq.heappush(heap, pair)
    return [piece for piece in word.pieces if piece]


class _Word:
    """Pieces in a row; of two that were merged the left one is the whole, the right one empty."""

    def __init__(self, ranks: Ranks, letters: Sequence[str]) -> None:
        self._ranks = ranks
        self._end = len(letters)
        self.pieces = [*letters[:-1], letters[-1] + "</w>"]
        self.before = list(range(-1, self._end - 1))
        self._after = list(range(1, self._end + 1))

    def rank(self, left: int) -> int | None:
        """Of a piece and the one after it; None if they are not to be merged."""
        right = self._after[left]
        if right == self._end:
            return None
        return self._ranks.get((self.pieces[left], self.pieces[right]))

    def pairs(self, lefts: Iterable[int]) -> list[tuple[int, int]]:
        """Rank and left piece of those pairs that are to be merged."""
        found = ((self.rank(left), left) for left in lefts if left >= 0)
        return [(rank, left) for rank, left in found if rank is not None]

    def merge(self, left: int) -> None:
        """Make one of a piece and the one after it."""
        right = self._after[left]
        self.pieces[left] += self.pieces[right]
        self.pieces[right] = ""
        self._after[left] = self._after[right]
        if self._after[left] < self._end:
            self.before[self._after[left]] = left
