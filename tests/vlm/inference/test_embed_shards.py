"""Embeddings of shards: exact, whole or absent, and the same from any number of processes."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support import drawn_samples, tiny_bundle, write_dataset
from vlm.data.manifest import build_manifest
from vlm.data.samples import Sample
from vlm.data.write import write_shards
from vlm.distributed import Share, share_of_work
from vlm.errors import ConfigError, DataError
from vlm.inference import Encoder
from vlm.inference.embed_shards import EmbedConfig, EmbedResult, embed_shards
from vlm.inference.embeddings import iterate_embeddings, read_embeddings_info
from vlm.preprocess import decode_image

COUNT = 23


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    tiny_bundle(folder)
    return Encoder.load(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, COUNT, samples_per_shard=5)
    return folder


def run(
    encoder: Encoder, dataset: Path, out: Path, share: Share | None = None, **changes: object
) -> EmbedResult:
    config = EmbedConfig.model_validate({"batch_size": 2, "threads": 2, **changes})
    return embed_shards(encoder, str(dataset), out, share=share or Share(), config=config)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_row_is_its_images_embedding_with_its_caption_and_metadata(
    encoder: Encoder, dataset: Path, tmp_path: Path
) -> None:
    assert run(encoder, dataset, tmp_path) == EmbedResult(embedded=COUNT, complete=True)
    info = read_embeddings_info(tmp_path)
    assert (info.num_rows, info.num_bad, info.fingerprint) == (COUNT, 0, encoder.fingerprint)
    found = list(iterate_embeddings(tmp_path, fingerprint=encoder.fingerprint, chunk=4))
    expected = drawn_samples(COUNT)
    assert [i for rows in found for i in rows.ids] == [sample.key for sample in expected]
    assert [t for rows in found for t in rows.texts] == [sample.text for sample in expected]
    assert [m for rows in found for m in rows.metadata] == [s.metadata for s in expected]
    vectors = np.concatenate([rows.vectors for rows in found])
    images = [decode_image(sample.image) for sample in expected]
    np.testing.assert_allclose(vectors, encoder.encode_images(images), atol=1e-6)


def test_any_number_of_processes_makes_the_same_files(
    encoder: Encoder, dataset: Path, tmp_path: Path
) -> None:
    run(encoder, dataset, tmp_path / "one")
    results = [
        run(encoder, dataset, tmp_path / "three", Share(index=index, count=3))
        for index in (2, 0, 1)
    ]
    assert [result.complete for result in results] == [False, False, True]
    assert sum(result.embedded for result in results) == COUNT
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_a_process_that_was_stopped_goes_on_and_no_part_is_half_there(
    encoder: Encoder, dataset: Path, tmp_path: Path
) -> None:
    run(encoder, dataset, tmp_path / "whole")
    seen: list[int] = []
    stopped = embed_shards(
        encoder,
        str(dataset),
        tmp_path / "out",
        share=Share(),
        config=EmbedConfig(batch_size=2),
        stopping=lambda: len(seen) > 4,  # inside the second part
        progress=lambda done, total: seen.append(done),
    )
    assert stopped == EmbedResult(embedded=5, stopped=True)
    assert set(files(tmp_path / "out")) == {"part-000000.parquet"}
    with pytest.raises(DataError, match="not complete yet"):
        read_embeddings_info(tmp_path / "out")
    again = run(encoder, dataset, tmp_path / "out")
    assert again == EmbedResult(embedded=COUNT - 5, skipped=5, complete=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_parts_of_another_model_or_of_other_bytes_are_refused(
    encoder: Encoder, dataset: Path, tmp_path: Path
) -> None:
    run(encoder, dataset, tmp_path / "out")
    tiny_bundle(tmp_path / "other", seed=1)
    other = Encoder.load(tmp_path / "other")
    with pytest.raises(DataError, match="made otherwise, fingerprint differ"):
        run(other, dataset, tmp_path / "out")
    with pytest.raises(DataError, match="dtype differ"):
        run(encoder, dataset, tmp_path / "out", dtype="float16")
    write_dataset(tmp_path / "longer", COUNT + 2, samples_per_shard=5)
    with pytest.raises(DataError, match="shard_sha256 differ"):
        run(encoder, tmp_path / "longer", tmp_path / "out")
    with pytest.raises(DataError, match="embeddings of model"):
        list(iterate_embeddings(tmp_path / "out", fingerprint=other.fingerprint, chunk=4))
    (tmp_path / "out" / "part-000001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="no part that this program wrote"):
        run(encoder, dataset, tmp_path / "out")


def test_float16_halves_the_vectors_and_keeps_the_cosines(
    encoder: Encoder, dataset: Path, tmp_path: Path
) -> None:
    rows = []
    for dtype in ("float32", "float16"):
        run(encoder, dataset, tmp_path / dtype, dtype=dtype)
        found = iterate_embeddings(tmp_path / dtype, fingerprint=encoder.fingerprint, chunk=99)
        rows.append(np.concatenate([part.vectors for part in found]))
    np.testing.assert_allclose((rows[0] * rows[1]).sum(1), 1, atol=1e-5)
    vector = pq.read_schema(tmp_path / "float16" / "part-000000.parquet").field("vector").type
    assert str(vector.value_type) == "halffloat"


def test_images_that_cannot_be_decoded_are_left_out_named_and_limited(
    encoder: Encoder, tmp_path: Path
) -> None:
    samples = drawn_samples(10)
    samples[3] = Sample(key="torn", image=samples[3].image[:40], text="a torn image")
    write_shards(samples, tmp_path / "data", prefix="x", samples_per_shard=10)
    build_manifest(tmp_path / "data")
    with pytest.raises(DataError, match=r"1 of its 10 samples .* over max_bad_fraction=1.0%"):
        run(encoder, tmp_path / "data", tmp_path / "out")
    assert not files(tmp_path / "out")
    result = run(encoder, tmp_path / "data", tmp_path / "out", max_bad_fraction=0.1)
    assert result == EmbedResult(embedded=9, bad=1, complete=True)
    metadata = pq.read_metadata(tmp_path / "out" / "part-000000.parquet").metadata
    assert list(json.loads(metadata[b"vlm.bad"])) == ["torn"]


def test_a_process_knows_its_share_from_torchrun_or_from_an_indexed_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    assert share_of_work() == Share(index=0, count=1)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    with pytest.raises(ConfigError, match="pod 3 of an Indexed Job"):
        share_of_work()
    found = share_of_work(pods=4)
    assert (found.index, found.count) == (3, 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = share_of_work()
    assert (found.index, found.count) == (1, 2)
    with pytest.raises(ConfigError, match="4 pods were promised and torchrun started 2"):
        share_of_work(pods=4)
