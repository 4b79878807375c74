"""The contract that every store keeps; exact numpy search is the oracle."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import BadInputError, FingerprintError
from serving.stores import EmbeddedStore, Item, Store
from tests.support import unit_rows

OpenStore = Callable[[Path], Store]


def open_embedded(folder: Path) -> Store:
    return EmbeddedStore(folder, fingerprint="f" * 64, dim=8)


@pytest.fixture(params=[open_embedded], ids=["embedded"])
def open_store(request: pytest.FixtureRequest) -> OpenStore:
    found: OpenStore = request.param
    return found


def items(count: int, *, start: int = 0) -> list[Item]:
    rows = unit_rows(start + count, 8).float().numpy()[start:]
    return [
        Item(
            id=f"i{start + n:04d}",
            vector=row,
            text=f"thing {start + n}",
            metadata={"parity": "even" if (start + n) % 2 == 0 else "odd", "n": start + n},
            thumbnail=b"webp" if n % 3 == 0 else None,
        )
        for n, row in enumerate(rows)
    ]


def test_search_equals_exact_search(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    stored = items(300)
    store.upsert(stored)
    matrix = np.stack([item.vector for item in stored])
    for query in unit_rows(10, 8, seed=9).float().numpy():
        hits = store.search(query, 12, {})
        expected = np.argsort(-(matrix @ query), kind="stable")[:12]
        assert [hit.id for hit in hits] == [f"i{n:04d}" for n in expected]
        np.testing.assert_allclose([h.score for h in hits], (matrix @ query)[expected], atol=1e-5)


def test_filters_hold_and_count_types(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    store.upsert(items(40))
    query = items(1)[0].vector
    odd = store.search(query, 100, {"parity": "odd"})
    assert {hit.metadata["parity"] for hit in odd} == {"odd"}
    assert len(odd) == 20
    assert [hit.id for hit in store.search(query, 5, {"parity": "odd", "n": 7})] == ["i0007"]
    assert store.search(query, 5, {"n": "7"}) == []
    with pytest.raises(BadInputError, match="filter 'n': must be a string"):
        store.search(query, 5, {"n": [7]})


@given(value=st.text(max_size=20))
@settings(max_examples=25, deadline=None)
def test_no_filter_or_id_can_escape_its_quotes(value: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = open_embedded(Path(folder))
        base = items(2)
        special = Item(id="x" + value, vector=base[0].vector, metadata={"k": value})
        store.upsert([special, base[1]])
        assert [h.id for h in store.search(base[0].vector, 5, {"k": value})] == ["x" + value]
        assert store.existing(["x" + value, "none"]) == {"x" + value}
        found = store.get("x" + value)
        assert found is not None
        assert found.metadata == {"k": value}
        assert store.delete(["x" + value]) == 1
        assert store.count() == 1


def test_equal_scores_are_ordered_by_id(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    row = items(1)[0].vector
    store.upsert([Item(id=name, vector=row) for name in "dacbe"])
    assert [hit.id for hit in store.search(row, 3, {})] == ["a", "b", "c"]


def test_upsert_replaces_and_the_last_of_equal_ids_counts(
    tmp_path: Path, open_store: OpenStore
) -> None:
    store = open_store(tmp_path)
    first, second = items(2)
    store.upsert([first, Item(id=first.id, vector=second.vector, text="newer")])
    store.upsert([Item(id=first.id, vector=second.vector, text="newest")])
    assert store.count() == 1
    found = store.get(first.id)
    assert found is not None
    assert found.text == "newest"
    np.testing.assert_array_equal(found.vector, second.vector)


def test_items_come_back_whole_and_survive_reopening(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    store.upsert(items(5))
    again = open_store(tmp_path)
    expected = items(5)[3]
    found = again.get(expected.id)
    assert found is not None
    assert (found.text, found.metadata, found.thumbnail) == (
        expected.text, expected.metadata, expected.thumbnail,
    )  # fmt: skip
    assert [h.has_thumbnail for h in again.search(expected.vector, 1, {})] == [True]
    assert again.get("none") is None


def test_deleting_counts_what_was_there(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    store.upsert(items(4))
    assert store.delete(["i0001", "i0002", "none"]) == 2
    assert store.delete([]) == 0
    assert store.existing(["i0000", "i0001"]) == {"i0000"}
    assert store.existing([]) == set()


def test_nothing_changes_for_an_empty_upsert_and_many_small_ones_are_merged(
    tmp_path: Path, open_store: OpenStore
) -> None:
    store = open_store(tmp_path)
    store.upsert([])
    for number in range(55):
        store.upsert(items(1, start=number))
    store.optimize()
    assert store.count() == 55


def test_another_models_vectors_are_refused_with_both_fingerprints(tmp_path: Path) -> None:
    open_embedded(tmp_path)
    with pytest.raises(
        FingerprintError, match="model ffffffffffff, and this is model 000000000000"
    ):
        EmbeddedStore(tmp_path, fingerprint="0" * 64, dim=8)


def test_a_vector_of_another_length_is_a_callers_mistake(
    tmp_path: Path, open_store: OpenStore
) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(8,\)"):
        store.upsert([Item(id="x", vector=np.zeros(3, np.float32))])


@pytest.mark.slow
def test_what_was_acknowledged_before_a_kill_is_there_and_nothing_is_half_visible(
    tmp_path: Path,
) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.serving.test_stores import items, open_embedded\n"
        f"store = open_embedded(Path({str(tmp_path)!r}))\n"
        "for batch in range(10_000):\n"
        "    store.upsert(items(5, start=5 * batch))\n"
        "    print(batch, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = -1
    start = time.monotonic()
    for line in process.stdout:
        acknowledged = int(line)
        if acknowledged >= 12 or time.monotonic() - start > 60:
            break
    process.kill()
    rest = process.stdout.read().split()
    process.stdout.close()
    process.wait()
    acknowledged = int(rest[-1]) if rest else acknowledged
    store = open_embedded(tmp_path)
    written = [f"i{n:04d}" for n in range(5 * (acknowledged + 1))]
    assert store.existing(written) == set(written)
    assert store.count() % 5 == 0
    store.upsert(items(5, start=9_000))
    assert store.count() % 5 == 0


def test_many_equal_scores_are_still_ordered_by_id(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    row = items(1)[0].vector
    names = [f"t{n:03d}" for n in np.random.default_rng(0).permutation(150)]
    store.upsert([Item(id=name, vector=row) for name in names])
    assert [hit.id for hit in store.search(row, 5, {})] == [f"t{n:03d}" for n in range(5)]


def test_writes_from_threads_and_from_a_second_opening_lose_nothing(
    tmp_path: Path, open_store: OpenStore
) -> None:
    stores = [open_store(tmp_path), open_store(tmp_path)]
    stored = items(80)

    def write(start: int) -> None:
        for item in stored[start::4]:
            stores[start % 2].upsert([item])

    threads = [threading.Thread(target=write, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = open_store(tmp_path)
    assert again.count() == 80
    assert again.existing([item.id for item in stored]) == {item.id for item in stored}
