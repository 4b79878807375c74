from pathlib import Path

import numpy as np
import pytest

from serving.services.migration import move, verify
from serving.stores import EmbeddedStore, Item
from tests.support import unit_rows


def filled(folder: Path, count: int) -> EmbeddedStore:
    store = EmbeddedStore(folder, fingerprint="a" * 64, dim=8)
    store.upsert([item(n) for n in range(count)])
    return store


def item(number: int, *, text: str = "t") -> Item:
    row = unit_rows(1, 8, seed=number).float().numpy()[0]
    return Item(id=f"{number:04d}", vector=row, text=text, thumbnail=b"%d" % number)


def test_a_copy_has_the_same_count_and_checksum_even_after_an_interruption(tmp_path: Path) -> None:
    source = filled(tmp_path / "a", 300)
    target = EmbeddedStore(tmp_path / "b", fingerprint="a" * 64, dim=8)
    target.upsert([item(9_999)])  # not in the source: it goes

    def interrupt(written: int, kept: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move(source, target, progress=interrupt)
    assert 0 < target.count() < 300
    with pytest.raises(ValueError, match=r"300 items with checksum .* 257 with"):
        verify(source, target)
    done = move(source, target)
    assert (done.written, done.kept, done.removed) == (44, 256, 1)
    assert verify(source, target)[0] == 300
    assert move(source, target).written == 0


def test_another_models_vectors_are_made_once_and_only_where_the_content_changed(
    tmp_path: Path,
) -> None:
    source = filled(tmp_path / "a", 5)
    target = EmbeddedStore(tmp_path / "b", fingerprint="b" * 64, dim=4)
    embedded: list[str] = []
    new = unit_rows(1, 4, seed=1).float().numpy()[0]

    def embed(items: list[Item]) -> list[np.ndarray]:
        embedded.extend(each.id for each in items)
        return [new] * len(items)

    move(source, target, embed=embed)
    assert embedded == [f"{n:04d}" for n in range(5)]
    source.upsert([item(2, text="another caption of the same picture")])
    source.upsert([Item(id="0003", vector=item(3).vector, modality="text", text="now words")])
    move(source, target, embed=embed)
    assert embedded[5:] == ["0003"]
    for item_id in ("0002", "0003"):
        ours, theirs = source.get(item_id), target.get(item_id)
        assert ours is not None
        assert theirs is not None
        assert (theirs.text, theirs.modality) == (ours.text, ours.modality)
        np.testing.assert_array_equal(theirs.vector, new)


def test_what_is_written_while_a_move_runs_is_moved_too(tmp_path: Path) -> None:
    source = filled(tmp_path / "a", 6)
    target = EmbeddedStore(tmp_path / "b", fingerprint="a" * 64, dim=8)
    passes = 0

    def meanwhile(written: int, kept: int) -> None:
        nonlocal passes
        passes += 1
        if passes == 1:
            source.upsert([item(50), item(0, text="changed")])
            source.delete(["0001"])

    def switch() -> None:
        assert verify(source, target)[0] == 6
        source.upsert([item(60), item(2, text="at the last moment")])
        source.delete(["0003"])

    move(source, target, progress=meanwhile, switch=switch)
    assert verify(source, target)[0] == 6
