"""What is LanceDB's alone: kills of its process, snapshots, folders of other versions."""

import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import (
    BadInputError,
    FingerprintError,
    NotFoundError,
    ServingError,
    StoreUnavailableError,
)
from serving.stores import EmbeddedStore, Item, parse_filter
from tests.serving.stores.samples import items, open_embedded


@given(value=st.text(max_size=20))
@settings(max_examples=25, deadline=None)
def test_no_filter_or_id_can_escape_its_quotes(value: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = open_embedded(Path(folder))
        base = items(2)
        special = Item(id="x" + value, vector=base[0].vector, metadata={"k": value})
        store.upsert([special, base[1]])
        same = parse_filter({"k": value})
        assert [h.id for h in store.search(base[0].vector, 5, same)] == ["x" + value]
        part = parse_filter({"k": {"contains": value or "x"}, "x" + value: {"gt": 0}})
        assert store.search(base[0].vector, 5, part) == []
        assert store.existing(["x" + value, "none"]) == {"x" + value}
        found = store.get("x" + value)
        assert found is not None
        assert found.metadata == {"k": value}
        assert store.delete(["x" + value]) == 1
        assert store.count() == 1


def test_another_models_vectors_are_refused_with_both_fingerprints(tmp_path: Path) -> None:
    open_embedded(tmp_path)
    with pytest.raises(
        FingerprintError, match="model ffffffffffff, and this is model 000000000000"
    ):
        EmbeddedStore(tmp_path, fingerprint="0" * 64, dim=8)


@pytest.mark.parametrize("damaged", ["_indices", "data"])
def test_files_that_are_damaged_are_told_as_such(tmp_path: Path, damaged: str) -> None:
    store = open_embedded(tmp_path)
    store.upsert(items(300))
    store.build_index()
    for file in (tmp_path / "items.lance" / damaged).rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    vector, effort = items(1)[0].vector, store.efforts[0][0]
    with pytest.raises(StoreUnavailableError, match=r"cannot be used \(.*restore a snapshot"):
        open_embedded(tmp_path).search(vector, 5, effort=effort)


def test_writes_into_damaged_files_are_told_as_such(tmp_path: Path) -> None:
    store = open_embedded(tmp_path)
    store.upsert(items(3))
    for file in (tmp_path / "items.lance" / "data").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(StoreUnavailableError, match="cannot be used"):
        store.upsert(items(2))
    with pytest.raises(StoreUnavailableError, match="cannot be used"):
        store.delete_where(parse_filter({"parity": "even"}))


@pytest.mark.parametrize("whole", [True, False])
def test_a_table_without_versions_is_not_begun_anew(tmp_path: Path, whole: bool) -> None:
    open_embedded(tmp_path).upsert(items(3))
    versions = tmp_path / "items.lance" / "_versions"
    for file in versions.iterdir():
        file.unlink() if whole else file.write_bytes(b"damaged")
    if whole:
        versions.rmdir()
    with pytest.raises(StoreUnavailableError, match="restore a snapshot or a copy"):
        open_embedded(tmp_path)


@pytest.mark.slow
def test_what_was_acknowledged_before_a_kill_is_there_and_nothing_is_half_visible(
    tmp_path: Path,
) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.serving.stores.samples import items, open_embedded\n"
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


def test_a_snapshot_brings_back_what_was_there(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path, fingerprint="f" * 64, dim=8)
    store.upsert(items(5))
    store.snapshot("before")
    store.delete_where(())
    store.upsert(items(1, start=9))
    store.optimize()
    store.restore("before")
    assert [item.id for item in store.scan(10)] == [item.id for item in items(5)]
    assert open_embedded(tmp_path).count() == 5
    store.upsert(items(1, start=9))
    store.snapshot("before")  # the name moves on
    assert store.snapshots() == ["before"]
    store.delete_where(())
    store.restore("before")
    assert store.count() == 6
    store.drop_snapshot("before")
    with pytest.raises(NotFoundError, match="no snapshot 'before'; there are: none"):
        store.restore("before")


@pytest.mark.parametrize("name", ["../x", "", "a b", "-a", "x" * 65])
def test_a_snapshot_has_a_plain_name(tmp_path: Path, name: str) -> None:
    store = EmbeddedStore(tmp_path / "i", fingerprint="a" * 64, dim=8)
    with pytest.raises(BadInputError, match="a name is 1 to 64 letters"):
        store.snapshot(name)


@pytest.mark.filterwarnings("ignore:optimize:UserWarning")  # it warns of no retention at all
def test_a_snapshot_outlives_the_cleaning_up_of_old_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.stores.embedded._KEEP_VERSIONS", timedelta(0))
    store = EmbeddedStore(tmp_path, fingerprint="f" * 64, dim=8)
    store.upsert(items(5))
    store.snapshot("kept")
    for number in range(3):
        store.delete([f"i{number:04d}"])
    store.optimize()
    assert store.count() == 2
    store.restore("kept")
    assert store.count() == 5
    store.drop_snapshot("kept")
    store.optimize()
    assert store.count() == 5


def test_a_folder_of_an_earlier_version_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "collection.json").write_text('{"fingerprint": "' + "f" * 64 + '", "dim": 8}')
    with pytest.raises(ServingError, match="format 1, this is 2.; index the data again"):
        open_embedded(tmp_path)
