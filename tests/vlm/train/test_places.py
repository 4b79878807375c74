"""Checkpoints in an object store: whole or not there, kept, resumed, exported."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.distributed import run_ranks
from tests.object_stores import s3_environment, s3_server
from tests.support import write_dataset
from tests.vlm.train.runs import configured, final_weights, records, run, train_on_ranks
from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.train import TrainConfig
from vlm.train.doctor_network import network_findings
from vlm.train.export import load_run
from vlm.train.places import checkpoint_place


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    write_dataset(tmp_path / "shards", 64)
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    resource = boto3.resource("s3", endpoint_url=endpoint)
    return resource.create_bucket(Bucket=f"b-{tmp_path.name.replace('_', '-').lower()[:40]}")


def stored(tmp_path: Path, bucket: Any, name: str, **changes: Any) -> TrainConfig:
    data: dict[str, Any] = {
        "shards": str(tmp_path / "shards"),
        "stream": {"group_field": "concept"},
        "remote": {"cache": str(tmp_path / "cache"), "attempts": 2, "backoff_seconds": 0.01},
    }
    where = f"s3://{bucket.name}/runs"
    return configured(
        tmp_path, name=name, data=data, checkpoints=where, steps=6, checkpoint_every=2, **changes
    )


def names(bucket: Any, prefix: str) -> list[str]:
    return sorted(found.key for found in bucket.objects.filter(Prefix=prefix))


@pytest.mark.distributed
def test_a_run_lives_in_a_store_whatever_becomes_of_its_machine(
    bucket: Any, tmp_path: Path
) -> None:
    optim = {"type": "lion", "lr": 1e-3}
    straight = stored(tmp_path, bucket, "straight", optim=optim)
    assert run_ranks(2, train_on_ranks, straight, False) == [6, 6]
    steps = [
        f"runs/straight/step-{step:08d}/{name}"
        for step in (4, 6)  # the newest two, and nothing beside them
        for name in (
            "checkpoint.json", "ema-00000.safetensors", "ema-00001.safetensors",
            "model-00000.safetensors", "model-00001.safetensors",
            "optimizer-00000.safetensors", "optimizer-00001.safetensors",
        )
    ]  # fmt: skip
    assert names(bucket, "runs/straight/") == steps
    assert list((straight.run_folder / "checkpoints").iterdir()) == []
    uninterrupted = records(straight)[-1:]
    exported = load_run(straight.run_folder).model.state_dict()
    average = final_weights(straight, "ema")
    assert all(exported[key].equal(average[key]) for key in average)

    # Its last checkpoint torn, its folder and cache gone: another machine goes on from step 4.
    bucket.Object("runs/straight/step-00000006/model-00001.safetensors").put(Body=b"torn")
    for folder in (straight.run_folder, tmp_path / "cache"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"has checkpoints up to step 6. Continue it with"):
        run(straight)
    assert run(straight, resume=True) == 6
    (again,), (before,) = records(straight), uninterrupted
    assert again["step"] == before["step"] == 6
    assert again["loss"] == pytest.approx(before["loss"], rel=2e-5)
    assert names(bucket, "runs/straight/step-00000006/damaged.json") == []  # written anew


def test_what_is_half_written_in_a_store_is_no_checkpoint(bucket: Any, tmp_path: Path) -> None:
    config = stored(tmp_path, bucket, "half")
    folder = "runs/half/step-00000002"
    for name in ("written-00000", "written-00001", "model-00000.safetensors"):
        bucket.Object(f"{folder}/{name}").put(Body=b"{}")
    place = checkpoint_place(config)
    assert place.steps() == []
    assert run(config) == 6
    assert place.steps() == [4, 6]
    assert names(bucket, folder) == []
    info = json.loads(bucket.Object("runs/half/step-00000006/checkpoint.json").get()["Body"].read())
    name, (size, _) = next(iter(info["files"].items()))
    assert bucket.Object(f"runs/half/step-00000006/{name}").content_length == size


def test_a_store_that_takes_nothing_is_an_error_with_advice(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stored(tmp_path, bucket, "full")
    (found,) = network_findings(config, world_size=1)
    assert (found.verdict, found.check) == ("ok", "network")
    lost = config.model_copy(update={"checkpoints": "s3://no-such-bucket/runs"})
    (found,) = network_findings(lost, world_size=1)
    assert found.verdict == "problem"
    assert "no-such-bucket" in found.text
    with pytest.raises(
        DataError, match="no-such-bucket/runs/full: cannot be listed, there is no su"
    ):
        run(lost)
    assert not lost.run_folder.exists()

    def refuse(*_: object, **__: object) -> None:
        message = "403 the quota is used up"
        raise PermissionError(message)

    monkeypatch.setattr("obstore.put", refuse)
    with pytest.raises(CheckpointError, match=r"full/step-00000002: the check.*be written.*quota"):
        run(config)
    assert list((config.run_folder / "checkpoints").iterdir()) == []
    with pytest.raises(ConfigError, match="checkpoints: .*allowed are s3://, gs://, az://"):
        configured(tmp_path, checkpoints="https://host/runs")


@pytest.mark.parametrize(
    ("address", "verdict", "text"),
    [
        ("10.0.0.7", "ok", "is called node-7, at 10.0.0.7"),
        ("127.0.0.1", "ok", "where other nodes do not reach it"),
        (None, "warning", "node-7, which has no address"),
    ],
)
def test_the_doctor_looks_up_the_name_by_which_other_nodes_call_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str | None, verdict: str, text: str
) -> None:
    def look_up(name: str) -> str:
        if address is None:
            raise OSError
        return address

    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    monkeypatch.setattr(socket, "gethostbyname", look_up)
    (found,) = network_findings(configured(tmp_path), world_size=2)
    assert found.verdict == verdict
    assert text in found.text
