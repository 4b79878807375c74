"""The contract of what knows the collections and aliases, of folders and of a cluster."""

from itertools import count
from pathlib import Path

import pytest

from serving.errors import BadInputError, FingerprintError
from serving.stores import Catalog, FolderCatalog
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
