"""The contract of what knows the collections and aliases, of folders and of a cluster."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from serving.errors import BadInputError, ConflictError, FingerprintError, NotFoundError
from serving.stores import Catalog, FolderCatalog
from serving.stores.catalog import kept_in_place
from serving.stores.milvus_catalog import MilvusCatalog
from tests.serving.stores.samples import DIM, FINGERPRINT, items

_PREFIXES = count()


@pytest.fixture(params=["folders", "milvus"])
def catalogs(request: pytest.FixtureRequest, tmp_path: Path) -> list[Catalog]:
    """Of the same collections, as two processes have them."""
    if request.param == "folders":
        return [FolderCatalog(tmp_path / "index"), FolderCatalog(tmp_path / "index")]
    prefix = f"test{next(_PREFIXES)}_"
    cluster = request.getfixturevalue("cluster")
    return [MilvusCatalog(cluster, prefix=prefix), MilvusCatalog(cluster, prefix=prefix)]


def test_collections_aliases_and_notes_are_seen_by_every_process(catalogs: list[Catalog]) -> None:
    ours, theirs = catalogs
    assert (ours.names(), ours.aliases(), ours.find("default")) == ([], {}, None)
    ours.open("default", fingerprint=FINGERPRINT, dim=DIM).upsert(items(2))
    ours.open("my-photos_2", fingerprint="a" * 64, dim=4)
    assert theirs.names() == ["default", "my-photos_2"]
    with pytest.raises(FingerprintError, match="holds vectors of model aaaaaaaaaaaa"):
        theirs.open("my-photos_2", fingerprint=FINGERPRINT, dim=4)
    ours.note("my-photos_2", "measured")
    ours.point("default", "my-photos_2")
    ours.point("photos", "my-photos_2")
    assert theirs.aliases() == {"default": "my-photos_2", "photos": "my-photos_2"}
    for asked in ("default", "photos", "my-photos_2"):
        known = theirs.find(asked)
        assert known is not None
        assert (known.name, known.note) == ("my-photos_2", "measured")
        assert (known.info.fingerprint, known.info.dim) == ("a" * 64, 4)
    ours.point("photos", "default")
    ours.point("default", "default")
    assert ours.aliases() == {"photos": "default"}
    known = ours.find("photos")
    assert known is not None
    assert (known.name, known.note) == ("default", None)
    assert theirs.open(known.name, fingerprint=FINGERPRINT, dim=DIM).count() == 2
    ours.drop("my-photos_2")
    assert (ours.find("my-photos_2"), theirs.names()) == (None, ["default"])


@pytest.mark.parametrize("name", ["../x", "a b", "", "x" * 65, ".hidden"])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    """vlm index --collection ../x wrote beside the folder."""
    with pytest.raises(BadInputError, match="a name is 1 to 64 letters"):
        FolderCatalog(tmp_path / "i").open(name, fingerprint="f" * 64, dim=8)
    assert not list(tmp_path.iterdir())


def test_a_collection_is_looked_after_by_one_at_a_time(catalogs: list[Catalog]) -> None:
    ours, theirs = catalogs
    ours.open("default", fingerprint=FINGERPRINT, dim=DIM)
    with ours.alone("default") as first, theirs.alone("default") as second:
        assert (first, second) == (True, False)
    with theirs.alone("default") as again:
        assert again


def test_what_was_removed_takes_no_writes_and_harms_none_that_is_made_in_its_place(
    tmp_path: Path,
) -> None:
    """A write that was under way made files anew where the next one was made."""
    ours, theirs = FolderCatalog(tmp_path / "i"), FolderCatalog(tmp_path / "i")
    old = ours.open("birds", fingerprint=FINGERPRINT, dim=DIM)
    old.upsert(items(300))
    theirs.drop("birds")
    writes: list[Callable[[], object]] = [
        lambda: old.upsert(items(2)),
        lambda: old.delete(["i0001"]),
        old.build_index,
        old.optimize,
    ]
    others: list[Callable[[], object]] = [
        lambda: old.search_captions("red", 5),
        old.count,
        lambda: old.sample(5),
        lambda: old.version,
        lambda: ours.note("birds", "measured"),
        lambda: ours.drop("birds"),
    ]
    for call in [*writes, *others]:
        with pytest.raises(NotFoundError, match="removed meanwhile|not there any more"):
            call()
    assert ours.names() == []
    with ours.alone("birds") as alone:
        assert not alone
    new = theirs.open("birds", fingerprint=FINGERPRINT, dim=DIM)
    new.upsert(items(1))
    known = ours.find("birds")
    assert known is not None
    assert known.made == new.made != old.made
    for write in writes:
        with pytest.raises(NotFoundError, match="removed meanwhile"):
            write()
    assert [item.id for item in new.scan(5)] == ["i0000"]


def test_a_collection_that_is_written_to_is_not_removed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.stores.catalog._PATIENCE_SECONDS", 0.05)
    catalog = FolderCatalog(tmp_path / "i")
    store = catalog.open("birds", fingerprint=FINGERPRINT, dim=DIM)
    with kept_in_place(store.folder):
        store.upsert(items(1))  # others may write meanwhile
        with pytest.raises(ConflictError, match="is being written to, or removed; try again"):
            catalog.drop("birds")
    catalog.drop("birds")
    assert list((tmp_path / "i-collections").iterdir()) == []
