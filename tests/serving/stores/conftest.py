"""Every store there is, and a real Milvus server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from serving.stores.milvus import MilvusStore
from serving.stores.milvus_cluster import MilvusCluster, MilvusOptions
from tests.milvus_server import MilvusServer, install, milvus_server
from tests.serving.stores.samples import DIM, FINGERPRINT, OpenStore, open_embedded

_AHEAD = 8


@pytest.fixture(scope="session")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    """One server process for all tests that do not end it; skips where it cannot be had."""
    problem = install()
    if problem is not None:
        pytest.skip(problem)
    with milvus_server(tmp_path_factory.mktemp("milvus")) as server:
        yield server


@pytest.fixture(scope="session")
def cluster(milvus: MilvusServer) -> Iterator[MilvusCluster]:
    found = MilvusCluster(MilvusOptions(uri=milvus.uri))
    yield found
    found.close()


@pytest.fixture(scope="session")
def new_names(cluster: MilvusCluster) -> Iterator[Iterator[str]]:
    """Names of empty collections, each given once.

    The server takes two seconds for each, but not for itself: some are made ahead, side by side.
    """

    def made(number: int) -> str:
        name = f"made_{number}"
        MilvusStore(cluster, name, fingerprint=FINGERPRINT, dim=DIM)
        return name

    with ThreadPoolExecutor(_AHEAD) as pool:
        coming = [pool.submit(made, number) for number in range(_AHEAD)]

        def names() -> Iterator[str]:
            for number in count():
                coming.append(pool.submit(made, number + _AHEAD))
                yield coming[number].result()

        yield names()


@pytest.fixture(params=["embedded", "milvus"])
def open_store(request: pytest.FixtureRequest) -> OpenStore:
    if request.param == "embedded":
        return open_embedded
    cluster: MilvusCluster = request.getfixturevalue("cluster")
    names: Iterator[str] = request.getfixturevalue("new_names")
    known: dict[Path, str] = {}

    def open_milvus(folder: Path) -> MilvusStore:
        if folder not in known:
            known[folder] = next(names)
        return MilvusStore(cluster, known[folder], fingerprint=FINGERPRINT, dim=DIM)

    return open_milvus
