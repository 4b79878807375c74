"""Random changes of a caption's words.

Drop, swap, replace and insert are those of EDA (arXiv:1901.11196), repeat is that of ESimCSE
(arXiv:2109.04380), both on words as spaces divide them. A rate of 0 draws nothing.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from vlm.config import Config
from vlm.errors import DataError

__all__ = ["TextAugmentConfig", "augment_text"]

Synonyms = dict[str, list[str]]


class TextAugmentConfig(Config):
    """How much of a caption changes; the defaults change nothing."""

    probability: float = Field(1.0, ge=0, le=1)
    """Share of captions that are changed at all."""
    drop: float = Field(0.0, ge=0, lt=1)
    """Probability of each word to go; one always stays. EDA: 0.1."""
    repeat: float = Field(0.0, ge=0, le=1)
    """Of n words up to max(2, repeat n) come twice. ESimCSE: 0.32."""
    swap: float = Field(0.0, ge=0, le=1)
    """Of n words max(1, swap n) times two change places. EDA: 0.1."""
    replace: float = Field(0.0, ge=0, le=1)
    """Of n words up to max(1, replace n) give way to a synonym. EDA: 0.1."""
    insert: float = Field(0.0, ge=0, le=1)
    """Of n words max(1, insert n) times a synonym of one comes in anywhere. EDA: 0.1."""
    synonyms: Path | None = None
    """JSON file from a lower-case word to the list of its synonyms, for `replace` and `insert`."""

    @model_validator(mode="after")
    def _synonyms_are_there(self) -> "TextAugmentConfig":
        if (self.replace or self.insert) and self.synonyms is None:
            message = "replace and insert need synonyms: a JSON file of words and lists of words"
            raise ValueError(message)
        return self

    @property
    def changes_nothing(self) -> bool:
        rates = (self.drop, self.repeat, self.swap, self.replace, self.insert)
        return self.probability == 0 or not any(rates)


def augment_text(text: str, config: TextAugmentConfig, generator: np.random.Generator) -> str:
    """Change a caption's words at random; white space becomes single spaces where it does.

    Raises:
        DataError: If the file of synonyms cannot be read.
    """
    words = text.split()
    if config.changes_nothing or not words or generator.random() >= config.probability:
        return text
    if config.synonyms is not None:
        synonyms = _load_synonyms(config.synonyms)
        if config.replace:
            words = _replaced(words, config.replace, synonyms, generator)
        if config.insert:
            words = _inserted(words, config.insert, synonyms, generator)
    if config.swap:
        words = _swapped(words, config.swap, generator)
    if config.drop:
        words = _dropped(words, config.drop, generator)
    if config.repeat:
        words = _repeated(words, config.repeat, generator)
    return " ".join(words)


def _dropped(words: list[str], rate: float, generator: np.random.Generator) -> list[str]:
    stays = generator.random(len(words)) >= rate
    if not stays.any():
        stays[generator.integers(len(words))] = True
    return [word for word, stay in zip(words, stays, strict=True) if stay]


def _repeated(words: list[str], rate: float, generator: np.random.Generator) -> list[str]:
    most = max(2, int(rate * len(words)))
    count = min(int(generator.integers(most + 1)), len(words))
    twice = set(generator.choice(len(words), count, replace=False).tolist())
    return [copy for place, word in enumerate(words) for copy in [word] * (1 + int(place in twice))]


def _swapped(words: list[str], rate: float, generator: np.random.Generator) -> list[str]:
    words = list(words)
    if len(words) > 1:
        for _ in range(_times(rate, words)):
            first, second = generator.choice(len(words), 2, replace=False)
            words[first], words[second] = words[second], words[first]
    return words


def _replaced(
    words: list[str], rate: float, synonyms: Synonyms, generator: np.random.Generator
) -> list[str]:
    words = list(words)
    known = [place for place, word in enumerate(words) if word.lower() in synonyms]
    for place in generator.permutation(known)[: _times(rate, words)].tolist():
        words[int(place)] = _synonym(words[int(place)], synonyms, generator)
    return words


def _inserted(
    words: list[str], rate: float, synonyms: Synonyms, generator: np.random.Generator
) -> list[str]:
    known = [word for word in words if word.lower() in synonyms]
    words = list(words)
    for _ in range(_times(rate, words) if known else 0):
        word = known[int(generator.integers(len(known)))]
        place = int(generator.integers(len(words) + 1))
        words.insert(place, _synonym(word, synonyms, generator))
    return words


def _times(rate: float, words: list[str]) -> int:
    return max(1, int(rate * len(words)))


def _synonym(word: str, synonyms: Synonyms, generator: np.random.Generator) -> str:
    choices = synonyms[word.lower()]
    return choices[int(generator.integers(len(choices)))]


@functools.lru_cache(maxsize=4)
def _load_synonyms(path: Path) -> Synonyms:
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{path}: synonyms cannot be read ({error}); expected a JSON object"
        raise DataError(message) from error
    if not isinstance(tree, dict) or not all(_are_words(value) for value in tree.values()):
        message = f'{path}: expected a JSON object of words and lists, like {{"big": ["large"]}}'
        raise DataError(message)
    return {word.lower(): list(choices) for word, choices in tree.items() if choices}


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)
