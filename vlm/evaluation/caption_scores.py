"""How like captions are to those of people: BLEU and CIDEr-D.

Both are those of the COCO caption evaluation but for the tokenizer: theirs is a Java program,
ours lowers the case and drops punctuation.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

__all__ = ["bleu", "cider", "words_of"]

_LONGEST: Final = 4
_SIGMA: Final = 6.0
_WORD: Final = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?")

Words = list[str]
Ngrams = Counter[tuple[str, ...]]


def words_of(caption: str) -> Words:
    """The words of a caption, in lower case, without punctuation."""
    return _WORD.findall(caption.lower())


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus: precision of n-grams with the penalty for brevity.

    Args:
        candidates: One caption an image.
        references: All captions of people of that image, at least one.

    Returns:
        Four numbers from 0 to 1.

    Source: Papineni et al. 2002, with the closest reference length.
    """
    right, all_ngrams = [0] * _LONGEST, [0] * _LONGEST
    length = closest = 0
    for words, known in zip(candidates, references, strict=True):
        length += len(words)
        closest += min((abs(len(r) - len(words)), len(r)) for r in known)[1]
        most: Ngrams = Counter()
        for reference in known:
            most |= _ngrams(reference)
        for ngram, count in _ngrams(words).items():
            right[len(ngram) - 1] += min(count, most[ngram])
            all_ngrams[len(ngram) - 1] += count
    if length == 0:
        return [0.0] * _LONGEST
    brevity = min(1.0, math.exp(1 - closest / length))
    scores, product = [], 1.0
    for n in range(_LONGEST):
        product *= right[n] / all_ngrams[n] if all_ngrams[n] else 0.0
        scores.append(brevity * product ** (1 / (n + 1)))
    return scores


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each image: likeness of n-grams weighed by how rare they are, 0 to 10.

    An n-gram that many images' references have counts little; here an image is a document. It is
    clipped to the reference's count and falls with the square of the difference in length.

    Source: Vedantam, Zitnick & Parikh 2015 (arXiv:1411.5726), section 6, sigma 6, lengths in
        bigrams as its code counts them.
    """
    images: Ngrams = Counter()
    for known in references:
        images.update({ngram for reference in known for ngram in _ngrams(reference)})
    log_count = math.log(max(len(references), 1))

    def weigh(words: Words) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LONGEST)]
        for ngram, count in _ngrams(words).items():
            rarity = log_count - math.log(max(1, images[ngram]))
            vectors[len(ngram) - 1][ngram] = count * rarity
        norms = [math.sqrt(sum(v * v for v in vector.values())) for vector in vectors]
        return vectors, norms, max(len(words) - 1, 0)

    def likeness(candidate: Words, reference: Words) -> float:
        ours, our_norms, our_length = weigh(candidate)
        theirs, their_norms, their_length = weigh(reference)
        total = 0.0
        for n in range(_LONGEST):
            shared = sum(
                min(value, theirs[n].get(ngram, 0.0)) * theirs[n].get(ngram, 0.0)
                for ngram, value in ours[n].items()
            )
            norm = our_norms[n] * their_norms[n]
            total += shared / norm if norm else 0.0
        penalty = math.exp(-((our_length - their_length) ** 2) / (2 * _SIGMA**2))
        return 10 * penalty * total / _LONGEST

    return [
        sum(likeness(words, reference) for reference in known) / len(known)
        for words, known in zip(candidates, references, strict=True)
    ]


def _ngrams(words: Words) -> Ngrams:
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, _LONGEST + 1)
        for start in range(len(words) - n + 1)
    )
