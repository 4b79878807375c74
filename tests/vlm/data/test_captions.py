from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import drawing, encoded, samples_of, train_stream
from vlm.data.captions import CaptionConfig, caption_texts, choose_caption
from vlm.data.manifest import build_manifest
from vlm.data.reader import Reader
from vlm.data.samples import Sample
from vlm.data.sources.shards import ShardsSource
from vlm.data.stream import StreamConfig
from vlm.data.write import write_shards
from vlm.errors import DataError


def sample(text: str = "", **metadata: Any) -> Sample:
    return Sample(key="s", image=b"", text=text, metadata=metadata)


def config(**settings: Any) -> CaptionConfig:
    return CaptionConfig.model_validate(settings)


def drawn(found: Sample, settings: CaptionConfig, count: int = 1) -> Counter[str]:
    generator = np.random.default_rng(0)
    return Counter(choose_caption(found, settings, generator) for _ in range(count))


def test_captions_come_from_the_named_fields_in_order() -> None:
    found = sample("a dog", title="Rex", captions=["a brown dog", "", " a pet "], year=None)
    several = config(fields=[".txt", "captions", "title", "year", "missing"])
    assert caption_texts(found, several) == ["a dog", "a brown dog", "a pet", "Rex"]
    assert caption_texts(found, config(fields=["title"])) == ["Rex"]


def test_lines_are_captions_where_the_dataset_says_so() -> None:
    found = sample("a dog\n\n a brown dog \n")
    assert caption_texts(found, config(split_lines=True)) == ["a dog", "a brown dog"]
    assert caption_texts(found, config()) == ["a dog\n\n a brown dog"]


def test_each_of_many_captions_is_drawn_equally_often() -> None:
    found = sample("one", captions=["two", "three"])
    counts = drawn(found, config(fields=[".txt", "captions"]), 3000)
    assert set(counts) == {"one", "two", "three"}
    assert all(abs(count - 1000) < 120 for count in counts.values())


def test_many_captions_can_be_joined_or_the_longest_taken() -> None:
    found = sample("a dog", captions=["a brown dog", "dog"])
    fields = [".txt", "captions"]
    assert drawn(found, config(fields=fields, many="longest")) == {"a brown dog": 1}
    joined = config(fields=fields, many="concatenate")
    assert drawn(found, joined) == {"a dog a brown dog dog": 1}


def test_labels_become_texts_by_name_and_template() -> None:
    settings = config(
        fields=["label"],
        label_names=["tench", "goldfish"],
        templates=["a photo of a {}.", "a drawing of a {}."],
    )
    counts = drawn(sample(label=1), settings, 1000)
    assert set(counts) == {"a photo of a goldfish.", "a drawing of a goldfish."}
    assert min(counts.values()) > 400
    with pytest.raises(DataError, match=r"label 2 of 'label' has no name.*label_names has 2"):
        drawn(sample(label=2), settings)
    assert drawn(sample(label="shark"), config(fields=["label"])) == {"shark": 1}


def test_braces_in_a_caption_are_ordinary_characters() -> None:
    settings = config(templates=["this is {}"])
    assert drawn(sample("a {} set {0} {x}"), settings) == {"this is a {} set {0} {x}": 1}
    with pytest.raises(ValueError, match=r"exactly one \{\}"):
        config(templates=["a photo"])


def test_a_sample_without_a_caption_says_what_it_has() -> None:
    with pytest.raises(DataError, match=r"'s' has no caption.*fields=title.*\.json has year"):
        caption_texts(sample("", year=1999), config(fields=["title"]))


def test_new_settings_left_alone_draw_what_was_drawn_before() -> None:
    # The draws of captions with tags, as they were before there were fields and templates.
    found = sample("car", tags=["red", "fast"])
    settings = config(text=0.4, text_and_tags=0.3, tags=0.3)
    generator, reference = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(50):
        form = reference.choice(3, p=np.array([0.4, 0.3, 0.3]))
        expected = "car"
        if form:
            count = reference.integers(1, 3)
            tags = ", ".join(reference.permutation(["red", "fast"])[:count])
            expected = f"car, {tags}" if form == 1 else tags
        assert choose_caption(found, settings, generator) == expected


def json_only(folder: Path) -> Reader:
    """Twenty drawings whose captions lie in the metadata; two have none."""
    samples = [
        Sample(
            key=f"s{number}",
            image=encoded(drawing("red", "circle", seed=number)),
            text="",
            metadata={} if number in (3, 11) else {"caption": f"drawing {number}"},
        )
        for number in range(20)
    ]
    write_shards(samples, folder, prefix="drawn", samples_per_shard=10)
    return Reader(build_manifest(folder))


def test_training_takes_captions_from_metadata_and_replaces_samples_without(
    tmp_path: Path,
) -> None:
    reader = json_only(tmp_path)
    settings = StreamConfig.model_validate(
        {"captions": {"fields": ["caption"]}, "max_bad_fraction": 0.2}
    )
    train = train_stream(reader, settings, seed=0, ledger=tmp_path / "ledger.jsonl")
    batches = list(train.batches(0, 5))
    ids = {int(i) for batch in batches for i in batch.sample_ids}
    every = reader.sample_ids(np.arange(20)).tolist()
    assert ids == set(every) - {every[3], every[11]}
    ledger = (tmp_path / "ledger.jsonl").read_text()
    assert ledger.count("has no caption") == 2
    assert len(samples_of(ShardsSource(tmp_path))) == 20
