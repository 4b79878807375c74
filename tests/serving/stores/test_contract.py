"""The contract that every store keeps; exact numpy search is the oracle."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.stores import Effort, IsModality, Item, matches, parse_filter
from tests.serving.stores.samples import OpenStore, items
from tests.support import unit_rows


def test_search_equals_exact_search(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    stored = items(300)
    store.upsert(stored)
    matrix = np.stack([item.vector for item in stored])
    for query in unit_rows(10, 8, seed=9).float().numpy():
        hits = store.search(query, 12)
        expected = np.argsort(-(matrix @ query), kind="stable")[:12]
        assert [hit.id for hit in hits] == [f"i{n:04d}" for n in expected]
        np.testing.assert_allclose([h.score for h in hits], (matrix @ query)[expected], atol=1e-5)


def test_filters_hold_and_count_types(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    store.upsert(items(40))
    query = items(1)[0].vector
    odd = store.search(query, 100, parse_filter({"parity": "odd"}))
    assert {hit.metadata["parity"] for hit in odd} == {"odd"}
    assert len(odd) == 20
    both = parse_filter({"parity": "odd", "n": 7})
    assert [hit.id for hit in store.search(query, 5, both)] == ["i0007"]
    assert store.search(query, 5, parse_filter({"n": "7"})) == []


def test_no_filter_or_id_can_escape_its_quotes(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    row = items(1)[0].vector
    values = sorted(
        {*map(chr, range(0, 128, 9)), *"\n\\\"'%[]{}()$&|;-_ ", "it's", 'a"b', "'; --", "\\u0041"}
        | {"ü", "€", "\u0301", "\ud7ff", "\uffff", "\U0001f600", "\U0010ffff", '"] or id in ["'}
        | {"x" * 200, "%s"}
    )
    store.upsert([Item(id="x" + each, vector=row, metadata={"k": each}) for each in values])
    for value in values:
        same = parse_filter({"k": value})
        assert [hit.id for hit in store.search(row, 5, same)] == ["x" + value]
        found = store.get("x" + value)
        assert found is not None
        assert (found.id, found.metadata) == ("x" + value, {"k": value})
    part = parse_filter({"k": {"contains": "it's"}})
    assert [hit.id for hit in store.search(row, 5, part)] == ["xit's"]
    assert store.search(row, 5, parse_filter({'k"] > 0 or numbers["k': {"gt": 0}})) == []
    names = ["x" + each for each in values]
    assert store.existing([*names, "none"]) == set(names)
    assert [item.id for item in store.scan(len(names) + 1)] == sorted(names)
    assert store.delete(names[5:]) == len(names) - 5
    assert store.count() == 5


def test_equal_scores_are_ordered_by_id(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    row = items(1)[0].vector
    store.upsert([Item(id=name, vector=row) for name in "dacbe"])
    assert [hit.id for hit in store.search(row, 3)] == ["a", "b", "c"]


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
    assert [h.has_thumbnail for h in again.search(expected.vector, 1)] == [True]
    assert again.get("none") is None


def test_what_one_handle_has_acknowledged_the_next_read_of_every_other_sees(
    tmp_path: Path, open_store: OpenStore
) -> None:
    """Another worker process showed an item only up to a second after it was acknowledged."""
    writer, reader = open_store(tmp_path), open_store(tmp_path)
    assert reader.count() == 0
    for number, item in enumerate(items(6)):
        writer.upsert([item])
        assert reader.get(item.id) is not None
        assert reader.existing([item.id]) == {item.id}
        assert reader.search(item.vector, 1)[0].id == item.id
        assert [hit.id for hit in reader.search_captions(str(number), 1)] == [item.id]
        assert (reader.count(), len(reader.scan(9)), len(reader.sample(9))) == (number + 1,) * 3
    writer.delete(["i0000"])
    assert reader.get("i0000") is None
    assert reader.delete(["i0000"]) == 0
    before = reader.count()
    reader.upsert(items(1))
    assert writer.count() == before + 1


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


def test_a_vector_of_another_length_is_a_callers_mistake(
    tmp_path: Path, open_store: OpenStore
) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(8,\)"):
        store.upsert([Item(id="x", vector=np.zeros(3, np.float32))])


def test_many_equal_scores_are_still_ordered_by_id(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    row = items(1)[0].vector
    names = [f"t{n:03d}" for n in np.random.default_rng(0).permutation(150)]
    store.upsert([Item(id=name, vector=row) for name in names])
    assert [hit.id for hit in store.search(row, 5)] == [f"t{n:03d}" for n in range(5)]


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


GALLERY: list[dict[str, Any]] = [
    {"style": "flat", "year": 1990, "title": "The Sea", "tags": ["a", "b"], "ok": True},
    {"style": "flat", "year": 1995.5, "title": "a SEA of it's own", "tags": ["b"], "ok": False},
    {"style": "oil", "year": "1990", "title": "%_ 100", "tags": [], "ok": 1},
    {"style": None, "year": 10**400, "title": ["sea"], "it's": 'o"k', "ok": "true"},
    {"style": {"deep": "flat"}, "year": -3},
    {},
]
FILTERS: list[dict[str, Any]] = [
    {},
    {"style": "flat"},
    {"style": "flat", "year": {"gt": 1990}},
    {"year": 1990},
    {"year": 1990.0},
    {"year": {"gte": 1990, "lt": 1995.5}},
    {"year": {"lte": 1995.5}},
    {"year": {"gte": 10**500}},
    {"year": {"in": [1990, "1990", -3]}},
    {"title": {"contains": "sea"}},
    {"title": {"contains": "%_"}},
    {"title": {"contains": "IT'S"}},
    {"tags": "b"},
    {"tags": {"in": ["a", "z"]}},
    {"ok": True},
    {"ok": 1},
    {"ok": "true"},
    {"it's": 'o"k'},
    {"absent": {"lt": 5}},
]


def test_every_filter_lets_through_what_it_says(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    rows = unit_rows(len(GALLERY), 8).float().numpy()
    store.upsert(
        [Item(id=str(n), vector=rows[n], metadata=metadata) for n, metadata in enumerate(GALLERY)]
    )
    for tree in FILTERS:
        where = parse_filter(tree)
        expected = [str(n) for n, metadata in enumerate(GALLERY) if matches(where, metadata)]
        assert sorted(hit.id for hit in store.search(rows[0], 10, where)) == expected, tree
        assert store.count(where) == len(expected)
        assert [item.id for item in store.scan(10, where=where)] == expected


def test_images_and_texts_are_told_apart(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    first, second = items(2)
    store.upsert([first, Item(id="words", vector=second.vector, modality="text", text="w")])
    for modality, name in (("image", first.id), ("text", "words")):
        where = (IsModality(modality),)  # type: ignore[arg-type] # mypy sees str, not the literals
        (hit,) = store.search(first.vector, 5, where, vectors=True)
        assert (hit.id, hit.modality) == (name, modality)
        found = store.get(name)
        assert found is not None
        assert found.modality == modality
        assert hit.vector is not None
        np.testing.assert_array_equal(hit.vector, found.vector)


def test_items_are_removed_by_filter_all_at_once(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    store.upsert(items(10))
    assert store.delete_where(parse_filter({"n": {"gte": 7}})) == 3
    assert store.delete_where(parse_filter({"n": {"gte": 7}})) == 0
    assert store.count() == 7
    assert store.delete_where(()) == 7
    assert store.count() == 0


def test_pages_show_what_stays_once_whatever_is_written_meanwhile(
    tmp_path: Path, open_store: OpenStore
) -> None:
    store = open_store(tmp_path)
    store.upsert(items(20))
    first = store.scan(7)
    store.delete(["i0002", "i0015"])
    store.upsert([Item(id="a", vector=first[0].vector), *items(1, start=30)])
    seen, page = first, first
    while page := store.scan(7, after=page[-1].id):
        seen += page
    names = [f"i{n:04d}" for n in range(20) if n != 15]
    assert [item.id for item in seen] == [*names, "i0030"]
    assert (seen[3].text, seen[3].metadata, seen[3].thumbnail) == (
        "thing 3", {"parity": "odd", "n": 3}, b"webp",
    )  # fmt: skip
    np.testing.assert_array_equal(seen[9].vector, items(10)[9].vector)


def test_a_sample_has_no_item_twice(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path)
    assert store.sample(3) == []
    store.upsert(items(20))
    drawn = [item.id for item in store.sample(10, seed=1)]
    assert len(set(drawn)) == 10
    assert [item.id for item in store.sample(10, seed=1)] == drawn
    assert len(store.sample(50)) == 20


def test_captions_are_found_by_their_words_new_ones_too(
    tmp_path: Path, open_store: OpenStore
) -> None:
    store = open_store(tmp_path)
    row = items(1)[0].vector
    captions = {"a": "two dogs running", "b": "a dog", "c": "the cat's hat", "d": None}
    store.upsert([Item(id=name, vector=row, text=text) for name, text in captions.items()])
    assert {hit.id for hit in store.search_captions("dog", 5)} == {"a", "b"}
    assert store.search_captions("dogs run", 5)[0].id == "a"
    store.upsert([Item(id="e", vector=row, text="a zebra", metadata={"k": 1})])
    assert [hit.id for hit in store.search_captions("zebra", 5)] == ["e"]
    assert [hit.id for hit in store.search_captions("zebra dog", 5, parse_filter({"k": 1}))] == [
        "e"
    ]
    for harmless in ("", "  ", "' OR 1=1 --", '"', "dog AND (", "+-:*~^"):
        store.search_captions(harmless, 5)


def test_an_index_misses_little_and_new_items_not_at_all(
    tmp_path: Path, open_store: OpenStore
) -> None:
    store = open_store(tmp_path)
    stored = items(600)
    store.upsert(stored[:500])
    indexed = [store.is_indexed]
    store.build_index()
    assert [*indexed, store.is_indexed] == [False, True]
    store.upsert(stored[500:])
    store.delete([stored[0].id])
    matrix = np.stack([item.vector for item in stored[1:]])
    where = parse_filter({"parity": "odd"})
    queries = unit_rows(20, 8, seed=9).float().numpy()
    for again in range(2):
        found = total = 0
        for query in queries:
            exact = store.search(query, 10)
            assert [hit.id for hit in exact] == [
                f"i{n + 1:04d}" for n in np.argsort(-(matrix @ query), kind="stable")[:10]
            ]
            hits = store.search(query, 10, effort=Effort(probes=12, refine=10))
            odd = store.search(query, 10, where, effort=Effort(probes=12, refine=10))
            assert {hit.metadata["parity"] for hit in odd} == {"odd"}
            wanted = {hit.id for hit in exact} | {hit.id for hit in store.search(query, 10, where)}
            found += len(wanted & {hit.id for hit in [*hits, *odd]})
            total += len(wanted)
        assert found / total > 0.95, again
        store.optimize()


def test_searches_never_fail_while_items_are_written_indexed_and_merged(
    tmp_path: Path, open_store: OpenStore
) -> None:
    store = open_store(tmp_path)
    stored = items(300)
    store.upsert(stored[:100])
    query, where = stored[0].vector, parse_filter({"parity": "even"})
    ended = threading.Event()
    problems: list[Exception] = []
    searched = 0

    def search() -> None:
        nonlocal searched
        while not ended.is_set():
            try:
                assert store.search(query, 3)[0].id == stored[0].id
                assert len(store.search(query, 3, where, effort=Effort(probes=4, refine=20))) == 3
                assert store.search_captions("thing", 3)
                searched += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not happen
                problems.append(error)
                return

    thread = threading.Thread(target=search)
    thread.start()
    for start in range(100, 300, 10):
        store.upsert(stored[start : start + 10])
        if start == 150:
            store.build_index()
        if start == 250:
            store.optimize()
    store.delete_where(parse_filter({"n": {"gte": 200}}))
    ended.set()
    thread.join()
    assert problems == []
    assert searched > 0
    assert store.count() == 200
