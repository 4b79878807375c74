"""What is Milvus's alone: how collections lie in the cluster, its limits, and its failures."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serving.errors import BadInputError, FingerprintError, ServingError, StoreUnavailableError
from serving.services.migration import move, verify
from serving.stores import Effort, Item, parse_filter
from serving.stores.milvus import MilvusStore
from serving.stores.milvus_cluster import MilvusCluster, MilvusOptions
from tests.milvus_server import MilvusServer, install, milvus_server
from tests.serving.durability import survives
from tests.serving.stores.samples import DIM, FINGERPRINT, items, open_embedded

# How long a killed server is thought to be alive, and the next one waits: 30 s as it comes.
SOON_GIVEN_UP = {"common.session.ttl": "10"}


def opened(cluster: MilvusCluster, name: str, fingerprint: str = FINGERPRINT) -> MilvusStore:
    return MilvusStore(cluster, name, fingerprint=fingerprint, dim=DIM)


def test_a_collection_moves_there_and_back_even_if_it_is_interrupted(
    tmp_path: Path, cluster: MilvusCluster, new_names: Iterator[str]
) -> None:
    source, target = open_embedded(tmp_path / "a"), opened(cluster, next(new_names))
    odd = Item(
        id='"odd" ü', vector=items(1)[0].vector, modality="text", text="",
        metadata={"big": 10**30, "deep": {"a": [1, None]}, "x": 1e-9},
    )  # fmt: skip
    source.upsert([*items(300), odd])

    def interrupt(written: int, kept: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move(source, target, progress=interrupt)
    assert target.count() == 256
    done = move(source, target)
    assert (done.written, done.kept, done.removed) == (45, 256, 0)
    back = open_embedded(tmp_path / "b")
    assert move(target, back).written == 301
    assert verify(source, back) == verify(source, target)


def test_shards_the_flat_index_and_strong_reads_change_no_answer(
    milvus: MilvusServer, cluster: MilvusCluster, new_names: Iterator[str]
) -> None:
    options = MilvusOptions(uri=milvus.uri, shards=2, index="flat", consistency="strong")
    sharded, plain = opened(MilvusCluster(options), "sharded"), opened(cluster, next(new_names))
    stored = [
        *items(60),
        Item(id="listed", vector=items(1)[0].vector, metadata={"parity": ["odd"]}),
    ]
    for store in (sharded, plain):
        store.upsert(stored)
        store.upsert([Item(id="i0001", vector=stored[1].vector, metadata={"parity": "even"})])
        store.delete_where(parse_filter({"n": {"lt": 6, "gte": 4}}))
    assert (sharded.efforts, sharded.is_indexed) == ((), False)
    for tree in ({}, {"parity": "odd"}, {"parity": {"in": ["even", "none"]}}, {"parity": "none"}):
        where = parse_filter(tree)
        assert sharded.count(where) == plain.count(where), tree
        ours, theirs = (store.search(stored[3].vector, 40, where) for store in (sharded, plain))
        assert [hit.id for hit in ours] == [hit.id for hit in theirs]
    assert verify(sharded, plain)[0] == 59
    # How it was made is kept where it is, whatever is asked for by who opens it next.
    assert opened(cluster, "sharded").search(stored[0].vector, 1, effort=Effort(1, 1))


def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(
    cluster: MilvusCluster, new_names: Iterator[str]
) -> None:
    store = opened(cluster, next(new_names))
    row = np.eye(DIM, dtype=np.float32)[0]
    for item, said in (
        (Item(id="n" * 1025, vector=row), "id has 1025 bytes, and at most 1024 fit"),
        (Item(id="t", vector=row, text="ü" * 40_000), "'t': text has 80000 bytes"),
        (Item(id="m", vector=row, metadata={"k": "x" * 70_000}), "'m': metadata has"),
        (Item(id="p", vector=row, thumbnail=b"x" * 50_000), "'p': a thumbnail may have 49151"),
    ):
        with pytest.raises(BadInputError, match=said):
            store.upsert([Item(id="good", vector=row), item])
    assert store.count() == 0


def test_collections_of_other_models_and_of_others_are_refused(
    cluster: MilvusCluster, new_names: Iterator[str]
) -> None:
    name = next(new_names)
    with pytest.raises(
        FingerprintError, match="model ffffffffffff, and this is model 000000000000"
    ):
        opened(cluster, name, "0" * 64)
    cluster.call("create_collection", "foreign", dimension=4)
    with pytest.raises(
        ServingError, match="foreign: a collection of the cluster that this program"
    ):
        opened(cluster, "foreign")


def test_nothing_acknowledged_is_lost_and_none_half_done_when_the_writer_is_killed(
    milvus: MilvusServer,
) -> None:
    assert survives(milvus.uri, 2, longest=1.5) > 2


def test_what_was_acknowledged_before_the_server_is_killed_is_there_and_searches_go_on(
    tmp_path: Path,
) -> None:
    problem = install()
    if problem is not None:
        pytest.skip(problem)
    acknowledged: list[str] = []
    with milvus_server(tmp_path, more=SOON_GIVEN_UP) as server:
        store = opened(MilvusCluster(MilvusOptions(uri=server.uri, timeout_seconds=5)), "killed")

        def write() -> None:
            try:
                for batch in range(10_000):
                    some = items(5, start=5 * batch)
                    store.upsert(some)
                    acknowledged.extend(item.id for item in some)
            except StoreUnavailableError:
                return

        thread = threading.Thread(target=write)
        thread.start()
        while len(acknowledged) < 60:
            assert thread.is_alive()
            thread.join(0.01)
        server.kill()
        thread.join()
        with pytest.raises(StoreUnavailableError, match="the store at http://127.0.0.1"):
            store.count()
    with milvus_server(tmp_path, more=SOON_GIVEN_UP) as server:
        store = opened(MilvusCluster(MilvusOptions(uri=server.uri)), "killed")
        assert store.existing(acknowledged) == set(acknowledged)
        assert store.count() % 5 == 0
        hit = store.search(items(5)[0].vector, 1)[0]
        assert (hit.id, hit.text, hit.has_thumbnail) == ("i0000", "thing 0", True)
