import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.text_augment import TextAugmentConfig, augment_text
from vlm.errors import DataError

TEXT = "the quick brown fox jumps over the lazy dog today"


def config(**settings: Any) -> TextAugmentConfig:
    return TextAugmentConfig.model_validate(settings)


def changed(settings: TextAugmentConfig, count: int, text: str = TEXT) -> list[list[str]]:
    generator = np.random.default_rng(0)
    return [augment_text(text, settings, generator).split() for _ in range(count)]


@given(text=st.text(max_size=80), seed=st.integers(0, 99))
def test_the_default_keeps_every_character_and_draws_nothing(text: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    assert augment_text(text, config(), generator) == text
    assert generator.random() == np.random.default_rng(seed).random()


def test_words_drop_with_their_probability_and_stay_in_order() -> None:
    words = TEXT.split()
    found = changed(config(drop=0.3), 2000)
    assert abs(np.mean([len(some) for some in found]) - 7.0) < 0.15
    for some in found:
        rest = iter(words)
        assert all(word in rest for word in some)  # a subsequence


@given(text=st.text(max_size=40), seed=st.integers(0, 99))
def test_a_caption_with_words_keeps_one(text: str, seed: int) -> None:
    found = augment_text(text, config(drop=0.99), np.random.default_rng(seed))
    assert bool(found.split()) == bool(text.split())


def test_repeated_words_follow_each_other_and_are_at_most_the_share() -> None:
    words = [f"w{number}" for number in range(10)]
    found = changed(config(repeat=0.5), 3000, " ".join(words))
    extra = Counter(len(some) - 10 for some in found)
    # ESimCSE: the number of words that come twice is uniform on 0 to max(2, rate n).
    assert set(extra) == set(range(6))
    assert all(abs(count - 500) < 100 for count in extra.values())
    for some in found:
        assert list(dict.fromkeys(some)) == words
        assert max(Counter(some).values()) <= 2


@pytest.mark.parametrize("text", ["dog", "a dog"])
def test_short_captions_can_be_repeated_too(text: str) -> None:
    lengths = {len(some) for some in changed(config(repeat=0.32), 200, text)}
    assert lengths == set(range(len(text.split()), 2 * len(text.split()) + 1))


def test_swaps_keep_the_words_and_change_two_places_each() -> None:
    words = TEXT.split()
    for some in changed(config(swap=0.1), 300, TEXT.replace("the lazy", "a lazy")):
        expected = TEXT.replace("the lazy", "a lazy").split()
        assert sorted(some) == sorted(expected)
        assert sum(a != b for a, b in zip(some, expected, strict=True)) == 2
    assert changed(config(swap=0.5), 1, "dog") == [["dog"]]
    assert len(words) == 10


def synonyms(folder: Path, tree: Any) -> Path:
    path = folder / "synonyms.json"
    path.write_text(json.dumps(tree))
    return path


def test_synonyms_replace_and_join_words(tmp_path: Path) -> None:
    path = synonyms(tmp_path, {"Quick": ["fast", "swift"], "dog": ["hound"], "none": []})
    for some in changed(config(replace=0.1, synonyms=path), 200, "The quick dog"):
        assert len(some) == 3
        assert len({"fast", "swift", "hound"} & set(some)) == 1
    for some in changed(config(insert=0.5, synonyms=path), 200, "a quick dog here"):
        assert [w for w in some if w not in {"fast", "swift", "hound"}] == [
            "a",
            "quick",
            "dog",
            "here",
        ]
        assert len(some) == 6
    assert changed(config(replace=1, insert=1, synonyms=path), 1, "no such") == [["no", "such"]]


def test_a_share_of_captions_is_changed() -> None:
    found = changed(config(swap=0.1, probability=0.25), 2000, "a b c d e")
    share = np.mean([some != ["a", "b", "c", "d", "e"] for some in found])
    assert abs(share - 0.25) < 0.04


def test_synonyms_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need synonyms"):
        config(replace=0.1)
    wrong: list[Any] = [[], {"dog": "hound"}, {"dog": [1]}]
    for tree in wrong:
        path = synonyms(tmp_path, tree).rename(tmp_path / f"{len(str(tree))}.json")
        with pytest.raises(DataError, match="expected a JSON object of words and lists"):
            changed(config(replace=0.1, synonyms=path), 1)
    with pytest.raises(DataError, match=r"gone\.json: synonyms cannot be read"):
        changed(config(insert=0.1, synonyms=tmp_path / "gone.json"), 1)
