from pathlib import Path

import pytest

from serving.services.indexing import Pair, index_pairs
from serving.stores import EmbeddedStore, parse_filter
from tests.support import drawn_samples
from vlm.errors import DataError
from vlm.inference import Encoder
from vlm.preprocess import decode_image


def pairs(count: int) -> list[Pair]:
    return [
        Pair(id=sample.key, image=sample.image, text=sample.text, metadata=sample.metadata)
        for sample in drawn_samples(count)
    ]


@pytest.fixture
def store(tmp_path: Path, encoder: Encoder) -> EmbeddedStore:
    return EmbeddedStore(tmp_path, fingerprint=encoder.fingerprint, dim=encoder.dim)


def test_every_pair_is_found_by_its_own_image(encoder: Encoder, store: EmbeddedStore) -> None:
    some = pairs(12)
    progress: list[tuple[int, int]] = []
    assert index_pairs(encoder, store, some, progress=lambda *p: progress.append(p)) == (12, 0)
    assert progress == [(12, 0)]
    for pair in some:
        row = encoder.encode_images([decode_image(pair.image)])[0]
        best = store.search(row, 1, parse_filter({"style": "drawn"}))[0]
        assert best.score == pytest.approx(1, abs=1e-4)
        assert best.has_thumbnail


def test_an_interrupted_import_is_completed_by_the_next(
    encoder: Encoder, store: EmbeddedStore
) -> None:
    some = pairs(300)

    def interrupt(stored: int, skipped: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_pairs(encoder, store, some, progress=interrupt)
    half = store.count()
    assert 0 < half < 300
    assert index_pairs(encoder, store, some, progress=lambda *_: None) == (300 - half, half)
    assert index_pairs(encoder, store, some, progress=lambda *_: None) == (0, 300)
    assert store.count() == 300


def test_a_damaged_image_is_told_and_costs_no_other(encoder: Encoder, store: EmbeddedStore) -> None:
    broken: list[str] = []
    some = [*pairs(2), Pair(id="broken-7", image=b"no image", text="?"), *pairs(3)[2:]]
    done = index_pairs(encoder, store, some, progress=lambda *_: None, broken=broken.append)
    assert done == (3, 1)
    assert len(broken) == 1
    assert broken[0].startswith("broken-7: not a readable image")
    again = index_pairs(encoder, store, some, progress=lambda *_: None, broken=broken.append)
    assert again == (0, 4)
    assert store.count() == 3


def test_a_damaged_image_is_named(encoder: Encoder, store: EmbeddedStore) -> None:
    damaged = [*pairs(2), Pair(id="broken-7", image=b"no image", text="?")]
    with pytest.raises(DataError, match="broken-7: not a readable image"):
        index_pairs(encoder, store, damaged, progress=lambda *_: None)
    assert store.count() == 0
