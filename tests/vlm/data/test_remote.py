"""Training data from object stores, good and bad ones, against the same data on disk."""

import json
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import obstore
import obstore.store
import pytest
import torch
from typer.testing import CliRunner

from tests.object_stores import FaultyProxy, RangeServer, running, s3_environment, s3_server
from tests.support import STREAM_BATCH, train_stream, write_dataset
from vlm.cli.main import app
from vlm.data.check import check_remote_shards
from vlm.data.dataset import open_reader
from vlm.data.filter import FilterConfig, build_filter
from vlm.data.reader import Reader
from vlm.data.remote import RemoteConfig, RemoteShards, open_remote
from vlm.data.sequential import iterate_samples
from vlm.data.stream import StreamConfig
from vlm.errors import DataError, StoreError
from vlm.preprocess import decode_image, decode_picture
from vlm.types import Batch

RUN_LENGTH = 8
NUM_SAMPLES = 96
STEPS = 2 * NUM_SAMPLES // STREAM_BATCH
ALL_FAULTS = ("error", "throttle", "stall", "short", "refuse")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", NUM_SAMPLES, samples_per_shard=25)
    return tmp_path / "data"


@pytest.fixture
def bucket(
    endpoint: str, folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The dataset, uploaded; credentials and endpoint are where users have them."""
    name = f"bucket-{abs(hash(request.node.nodeid))}"
    for variable, value in s3_environment(endpoint).items():
        monkeypatch.setenv(variable, value)
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    store = obstore.store.from_url(f"s3://{name}/sets/drawn", client_options={"allow_http": True})
    for path in folder.iterdir():
        obstore.put(store, path.name, path.read_bytes())
    return f"s3://{name}/sets/drawn"


def patience(tmp_path: Path, **changes: Any) -> RemoteConfig:
    return RemoteConfig.model_validate(
        {
            "cache": str(tmp_path / "cache"),
            "timeout_seconds": 1.0,
            "backoff_seconds": 0.01,
            **changes,
        }
    )


def batches(
    location: str, remote: RemoteConfig, *, start: int = 0, rank: int = 0, size: int = 1
) -> list[Batch]:
    reader, _ = open_reader(location, remote=remote, run_length=RUN_LENGTH)
    config = StreamConfig.model_validate({"cache_bytes": 0, "max_bad_fraction": 0})
    stream = train_stream(reader, config, seed=4, run_length=RUN_LENGTH, rank=rank, size=size)
    with reader:
        return list(stream.batches(start, STEPS))


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.token_ids, b.token_ids)
        assert torch.equal(a.images, b.images)


def test_a_faulty_store_gives_the_batches_of_a_disk(
    bucket: str, endpoint: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = FaultyProxy(endpoint, rate=0.25, kinds=ALL_FAULTS)
    with running(proxy):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        found = batches(bucket, patience(tmp_path))
    assert set(proxy.injected) == set(ALL_FAULTS)
    assert_equal(found, batches(str(folder), patience(tmp_path)))


def test_without_a_cache_every_sample_is_asked_for_and_is_right(
    bucket: str, endpoint: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = FaultyProxy(endpoint, rate=0.05, kinds=("error", "short"))
    with running(proxy):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        found = batches(bucket, patience(tmp_path, cache_bytes=0))
    assert_equal(found, batches(str(folder), patience(tmp_path)))
    assert not (tmp_path / "cache/stretches").exists()


def test_each_run_is_fetched_once_and_a_second_start_fetches_nothing(
    bucket: str, endpoint: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = sum(path.stat().st_size for path in folder.glob("*.tar"))
    proxy = FaultyProxy(endpoint, rate=0, kinds=())
    with running(proxy):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        first = batches(bucket, patience(tmp_path))
        tables = sum((folder / name).stat().st_size for name in ("shards.npy", "index.npy"))
        tables += (folder / "manifest.json").stat().st_size
        # Two epochs; only padding and end marks of the tars are never asked for.
        assert shards * 0.9 < proxy.bytes_served - tables <= shards
        # 12 runs of 8, three of them cut by the ends of shards of 25; and three tables.
        assert proxy.requests == 12 + 3 + 3
        before = proxy.requests
        second = batches(bucket, patience(tmp_path))
        assert proxy.requests == before + 1  # the manifest, to learn whether the data changed
    assert_equal(second, first)


def test_a_cache_too_small_for_the_dataset_stays_in_its_bound(
    bucket: str, folder: Path, tmp_path: Path
) -> None:
    bound = 60_000
    found = batches(bucket, patience(tmp_path, cache_bytes=bound))
    sizes = [p.stat().st_size for p in (tmp_path / "cache/stretches").iterdir()]
    assert 0 < sum(sizes) <= bound
    assert_equal(found, batches(str(folder), patience(tmp_path)))


def test_a_damaged_cache_is_fetched_again(bucket: str, folder: Path, tmp_path: Path) -> None:
    expected = batches(bucket, patience(tmp_path))
    for path in (tmp_path / "cache/stretches").iterdir():
        if not path.name.startswith("."):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 255
            path.write_bytes(data)
    for path in (tmp_path / "cache/tables").rglob("index.npy"):
        path.write_bytes(path.read_bytes()[:-5])
    assert_equal(batches(bucket, patience(tmp_path)), expected)


def _rank(location: str, cache: str, rank: int, size: int, out: str) -> None:
    remote = RemoteConfig.model_validate({"cache": cache, "cache_bytes": 100_000})
    found = batches(location, remote, rank=rank, size=size)
    torch.save([(b.sample_ids, b.token_ids, b.images) for b in found], out)


def test_processes_share_one_cache(bucket: str, folder: Path, tmp_path: Path) -> None:
    context = get_context("spawn")
    outs = [str(tmp_path / f"rank{rank}.pt") for rank in range(3)]
    ranks = [
        context.Process(target=_rank, args=(bucket, str(tmp_path / "cache"), rank, 3, outs[rank]))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    parts = [torch.load(out, weights_only=True) for out in outs]
    for step, batch in enumerate(batches(str(folder), patience(tmp_path))):
        for number, expected in enumerate((batch.sample_ids, batch.token_ids, batch.images)):
            assert torch.equal(torch.cat([part[step][number] for part in parts]), expected)
    kept = sum(p.stat().st_size for p in (tmp_path / "cache/stretches").iterdir())
    assert kept <= 100_000 + 8  # and the counter


def test_a_store_that_never_answers_stops_the_run_and_blames_no_sample(
    bucket: str, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = patience(tmp_path, attempts=3)
    reader, _ = open_reader(bucket, remote=remote, run_length=RUN_LENGTH)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    proxy = FaultyProxy(endpoint, rate=0, kinds=("error",))
    with running(proxy):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        reader, _ = open_reader(bucket, remote=remote, run_length=RUN_LENGTH)
        proxy.rate = 1.0
        with (
            reader,
            pytest.raises(StoreError, match=r"drawn-000000\.tar: the store failed 3 times"),
        ):
            reader.read(0)


def test_an_object_that_changed_or_vanished_is_named(
    bucket: str, folder: Path, tmp_path: Path
) -> None:
    reader, _ = open_reader(bucket, remote=patience(tmp_path), run_length=RUN_LENGTH)
    store = obstore.store.from_url(bucket, client_options={"allow_http": True})
    obstore.put(store, "drawn-000000.tar", (folder / "drawn-000000.tar").read_bytes() + b"\0" * 512)
    obstore.delete(store, "drawn-000001.tar")
    with reader:
        with pytest.raises(DataError, match=r"s3://.*/drawn-000000\.tar: changed since indexing"):
            reader.read(0)
        with pytest.raises(DataError, match=r"s3://.*/drawn-000001\.tar: no such object"):
            reader.read(30)


def test_a_dataset_without_manifest_or_with_a_foreign_table_is_refused(
    bucket: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: no such object"):
        open_remote(bucket.rsplit("/", 1)[0] + "/nothing", patience(tmp_path))
    store = obstore.store.from_url(bucket, client_options={"allow_http": True})
    data = bytearray((folder / "index.npy").read_bytes())
    data[-1] ^= 1
    obstore.put(store, "index.npy", bytes(data))
    with pytest.raises(DataError, match=r"index\.npy: does not belong to its manifest\.json"):
        open_remote(bucket, patience(tmp_path))
    obstore.put(store, "manifest.json", b"[]")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        open_remote(bucket, patience(tmp_path))


def test_plain_http_with_ranges_is_read_too(folder: Path, tmp_path: Path) -> None:
    server = RangeServer(folder.parent)
    with running(server):
        found = batches(f"{server.endpoint}/data", patience(tmp_path))
        streamed = list(iterate_samples(folder))
        reader, _ = open_reader(f"{server.endpoint}/data", remote=patience(tmp_path))
        with reader:
            assert [reader.read(row) for row in range(NUM_SAMPLES)] == streamed
    assert_equal(found, batches(str(folder), patience(tmp_path)))


def test_sequential_reading_of_a_url_gives_the_samples_of_the_folder(
    bucket: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert list(iterate_samples(bucket)) == list(iterate_samples(folder))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/data", "ftp://host/data: not a folder or a URL that can be used"),
        ("pipe:cat x", "no store|not a folder"),
        ("https://user:secret@host/data", "credentials in a URL end up in logs"),
        ("https://host/data?X-Amz-Signature=secret", "credentials in a URL end up in logs"),
    ],
)
def test_urls_that_are_not_allowed_are_refused_without_telling_secrets(
    url: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        open_remote(url, patience(tmp_path))
    assert "secret" not in str(caught.value)


def test_a_filtered_reader_fetches_what_lies_between_in_one_stretch(
    bucket: str, folder: Path, tmp_path: Path
) -> None:
    manifest, shards = open_remote(bucket, patience(tmp_path))
    assert isinstance(shards, RemoteShards)
    kept = np.arange(1, NUM_SAMPLES, 3)
    before = shards.traffic.requests
    with Reader(manifest, shards=shards, kept=kept, run_length=RUN_LENGTH) as reader:
        whole = list(iterate_samples(folder))
        found = [reader.read(row) for row in range(reader.num_samples)]
    assert found == [whole[row] for row in kept]
    # 4 runs of 8 kept samples, two of them cut by the end of a shard.
    assert shards.traffic.requests - before == 4 + 2


def test_the_verbs_work_on_a_url_as_on_the_folder(
    bucket: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["data", *arguments])
        assert result.exit_code == 0, result.exception
        return result.output

    one = ("--workers", "1")
    assert f"{bucket}: 96 samples, 4 shards" in said("show", bucket)
    assert "96 good samples in 4 shards, 0 damages" in said("check", bucket, *one)
    for location, name in ((bucket, "far"), (str(folder), "near")):
        said("stats", location, "--out", str(tmp_path / name), *one)
        rules = ("exact_duplicates=image_and_caption", "name=once")
        told = said("filter", location, "--out", str(tmp_path / f"{name}-filters"), *one, *rules)
    far, near = (
        json.loads((tmp_path / name / "stats.json").read_text()) for name in ("far", "near")
    )
    assert {**far, "folder": ""} == {**near, "folder": ""}
    rows = [(tmp_path / f"{name}-filters/once.npy").read_bytes() for name in ("far", "near")]
    assert rows[0] == rows[1]
    assert "upload" not in told
    assert said("write", bucket, str(tmp_path / "again"), *one).endswith("again\n")
    assert list(iterate_samples(tmp_path / "again")) == list(iterate_samples(folder))


def test_a_filter_is_read_from_beside_the_shards_of_a_store(
    bucket: str, folder: Path, tmp_path: Path
) -> None:
    config = FilterConfig(name="once", exact_duplicates="image")
    build_filter(folder, config, decode=decode_picture)
    with pytest.raises(DataError, match=r"once\.json: no such object; run `vlm data filter s3"):
        open_reader(bucket, remote=patience(tmp_path), filter_name="once")
    store = obstore.store.from_url(bucket, client_options={"allow_http": True})
    for path in (folder / "filters").iterdir():
        obstore.put(store, f"filters/{path.name}", path.read_bytes())
    far, _ = open_reader(bucket, remote=patience(tmp_path), filter_name="once")
    near, _ = open_reader(str(folder), remote=patience(tmp_path), filter_name="once")
    with far, near:
        assert far.fingerprint == near.fingerprint
        assert far.read(3) == near.read(3)
    obstore.put(store, "filters/once.npy", b"torn")
    with pytest.raises(DataError, match="missing or damaged"):
        open_reader(bucket, remote=patience(tmp_path), filter_name="once")


def test_damage_in_a_store_is_found_from_afar(
    bucket: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    store = obstore.store.from_url(bucket, client_options={"allow_http": True})
    data = (folder / "drawn-000000.tar").read_bytes()
    obstore.put(store, "drawn-000000.tar", data[:520] + b"\xff" + data[521:])
    obstore.delete(store, "drawn-000001.tar")
    obstore.put(store, "drawn-000002.tar", data)
    reports = check_remote_shards(bucket, decode=decode_image)
    found = {report.shard: report.damages[-1].reason for report in reports if report.damages}
    assert found.keys() == {f"drawn-00000{number}.tar" for number in range(3)}
    assert "its SHA-256 is not that of the manifest" in found["drawn-000000.tar"]
    assert found["drawn-000001.tar"].endswith("drawn-000001.tar: no such object")


def test_a_url_without_a_manifest_tells_where_to_index(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Index the shards where they are local"):
        open_remote(f"{bucket}/nothing", patience(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["write", "photos", "s3://bucket/out"], "shards are written to a folder"),
        (["index", "s3://bucket/raw"], "shards are indexed where they are local"),
        (["check", "s3://bucket/raw", "--repair"], "shards are repaired where they are local"),
        (["stats", "s3://bucket/raw"], "name one with --out"),
        (["filter", "s3://bucket/raw"], "name one with --out"),
    ],
)
def test_verbs_that_write_refuse_a_url_and_make_no_folder_named_like_it(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `vlm data write photos s3://bucket/out` wrote into ./s3:/bucket/out.
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["data", *arguments])
    assert isinstance(result.exception, DataError)
    assert said in str(result.exception)
    assert list(tmp_path.iterdir()) == []
