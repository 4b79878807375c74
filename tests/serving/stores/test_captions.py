import math

import pytest

from serving.stores.captions import bm25, words_of


def test_words_are_stems_without_accents_and_stop_words() -> None:
    assert words_of("The dogs' Cafés, are running in 2 cities_!") == words_of("dog cafe run 2 city")
    assert words_of("日本 naïve") == ["日本", "naiv"]
    assert words_of(" the of " + "x" * 41) == []


def test_a_rare_word_counts_more_and_a_longer_text_less() -> None:
    documents = [["dog"], ["dog", "red", "cat"], ["red"], ["red", "red"]]
    dog, both, red, twice = bm25(["dog", "red"], documents, total=10)
    assert both > dog > red
    assert twice > red
    # One document of the mean length that has the word once: its rarity over 1 + k1.
    (only,) = bm25(["dog"], [["dog"]], total=1)
    assert only == pytest.approx(math.log(1 + 0.5 / 1.5) / 2.2)
    assert bm25(["dog"], [], total=0) == []
