"""Captions by their words, for stores whose engine has no full-text search.

The store finds the items that have one of the words; they are ranked here.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import snowballstemmer

__all__ = ["bm25", "words_of"]

_K1: Final = 1.2
_B: Final = 0.75
_LONGEST: Final = 40
_STOP_WORDS: Final = re.compile(
    "(a|an|and|are|as|at|be|but|by|for|if|in|into|is|it|no|not|of|on|or|such|that|the|their|then|"
    "there|these|they|this|to|was|will|with)"
)


def words_of(text: str) -> list[str]:
    """The English stems of a text, in order, without accents and without stop words."""
    parts = unicodedata.normalize("NFKD", text)
    plain = "".join(part for part in parts if not unicodedata.combining(part))
    found = re.findall(r"[^\W_]+", plain.lower())
    return [
        _stem(word) for word in found if len(word) <= _LONGEST and not _STOP_WORDS.fullmatch(word)
    ]


def bm25(query: Sequence[str], documents: Sequence[Sequence[str]], *, total: int) -> list[float]:
    """Of each document how well it fits the query; 0 or more, higher is better.

    Args:
        query: Words.
        documents: Words of all documents that have one of the query's.
        total: How many documents there are in all.

    Source: Robertson and Zaragoza 2009, equation 3.15, with the inverse document frequency
    log(1 + (N - n + 0.5) / (n + 0.5)); the mean length is that of these documents.
    """
    counts = [Counter(words) for words in documents]
    mean = sum(len(words) for words in documents) / max(1, len(documents)) or 1.0
    having = {word: sum(word in count for count in counts) for word in set(query)}
    rarity = {
        word: math.log(1 + max(0.0, total - n + 0.5) / (n + 0.5)) for word, n in having.items()
    }
    return [
        sum(
            rarity[word] * count[word] / (count[word] + _K1 * (1 - _B + _B * len(words) / mean))
            for word in sorted(having)
        )
        for words, count in zip(documents, counts, strict=True)
    ]


@lru_cache(maxsize=50_000)
def _stem(word: str) -> str:
    # A stemmer keeps the word it is at in itself: threads cannot share one.
    stem: str = snowballstemmer.stemmer("english").stemWord(word)
    return stem
