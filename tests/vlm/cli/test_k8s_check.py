"""The doctor compares a training job's manifests with what the run needs."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.k8s.manifests import K8S
from tests.k8s.test_render import base_of, values
from tests.support import write_dataset
from tests.vlm.train.test_telemetry import config_tree
from vlm.cli.k8s import render_training
from vlm.cli.k8s_check import check_pods, check_sizes, write_speed
from vlm.cli.k8s_read import Pods, quantity, read_pods
from vlm.cli.main import app
from vlm.config import load_config
from vlm.errors import ConfigError
from vlm.train import TrainConfig
from vlm.train.doctor import Finding

RUN = K8S / "train/train.yaml"
GIB = 2**30
FIGURES: dict[str, dict[str, float | int]] = {
    "memory": {"process": GIB, "loader": GIB, "peak": 6 * GIB},
    "disk": {"checkpoint": 2 * GIB, "needed": 8 * GIB},
    "loader": {"computed": 16.0},
}


def rendered(folder: Path, overrides: list[str], **train: Any) -> Pods:
    """What `vlm k8s render` writes of the example run, read back."""
    folder.mkdir()
    config = load_config(TrainConfig, RUN, overrides)
    files = render_training(config, values(train=train), base=base_of(folder))
    for name, text in files.items():
        (folder / name).write_text(text)
    return read_pods(folder)


def sizes(pods: Pods, config: TrainConfig, **given: Any) -> dict[str, Finding]:
    given = {"on_gpu": False, "bytes_per_second": 2**30, **given}
    return {finding.check: finding for finding in check_sizes(pods, config, FIGURES, **given)}


@pytest.mark.parametrize("runner", ["job", "trainer"])
def test_a_job_is_read_as_it_was_rendered(tmp_path: Path, runner: str) -> None:
    pods = rendered(
        tmp_path / "train", [], runner=runner, nodes=4, memory="100Gi", save_seconds=600, runs="2Ti"
    )
    assert pods.kind == ("Job" if runner == "job" else "TrainJob")
    assert (pods.nodes, pods.pods, pods.ranks_per_node, pods.ranks, pods.gpus) == (4, 4, 8, 32, 8)
    assert (pods.memory, pods.save_seconds, pods.grace_seconds) == (100 * GIB, 600, 630)
    assert pods.volumes == {"/data": 100 * GIB, "/runs": 2**41}
    assert pods.cache == (40 * GIB if runner == "job" else None)
    config = load_config(TrainConfig, RUN, [])
    assert [f.verdict for f in check_pods(pods, config, world_size=None)] == ["ok", "ok"]
    assert {f.verdict for f in sizes(pods, config).values()} == {"ok"}
    assert "a step, not measured on such devices" in sizes(pods, config)["pods: time to save"].text


def test_whatever_disagrees_is_said_with_what_to_change(tmp_path: Path) -> None:
    config = load_config(TrainConfig, RUN, ["data.shards=s3://bucket/shards", "optim.lr=0.001"])
    pods = rendered(
        tmp_path / "train", ["loss.0.label_smoothing=0.1"], nodes=2, ranks_per_node=2,
        gpus_per_node=0, memory="4Gi", save_seconds=30, runs="4Gi",
    )  # fmt: skip
    found = {f.check: f for f in check_pods(pods, config, world_size=8)}
    assert "2 nodes x 2 ranks = 4, and --world-size is 8" in found["pods: ranks"].text
    assert "optim.lr=0.0001 in the pods, 0.001 here" in found["pods: configuration"].text
    assert "loss.0.label_smoothing=0.1 in the pods, 0.0 here" in found["pods: configuration"].text
    assert "shards" not in found["pods: configuration"].text  # paths may differ
    found |= sizes(pods, config, bytes_per_second=2**26)
    assert {f.verdict for f in found.values()} == {"problem"}
    # Two ranks of 6 GiB, and half of a checkpoint of 2 GiB.
    assert found["pods: memory"].text.startswith("13.00 GiB of the 4.0 GiB of a node")
    assert found["pods: memory"].advice == "train.memory=17Gi in the values"
    # 512 samples over 4 ranks of 16 samples/s, and 2 GiB at 64 MiB/s.
    assert "a step of 8.0 s and a checkpoint of 32.0 s" in found["pods: time to save"].text
    assert found["pods: time to save"].advice == "train.save_seconds=80 in the values"
    assert found["pods: volume"].advice.startswith("train.runs=16Gi")


def test_hand_made_contradictions_are_found(tmp_path: Path) -> None:
    config = load_config(
        TrainConfig, RUN, ["data.shards=s3://b/s", "data.remote.cache_bytes=9000000000"]
    )
    given: dict[str, Any] = {
        "kind": "Job", "nodes": 2, "pods": 3, "ranks_per_node": 4, "gpus": 2, "memory": None,
        "save_seconds": 300.0, "grace_seconds": 300.0, "volumes": {}, "cache": 8e9, "config": None,
    }  # fmt: skip
    found = {f.check: f for f in check_pods(Pods(**given), config, world_size=None)}
    assert "3 pods are started, and torchrun waits for PET_NNODES=2" in found["pods: ranks"].text
    assert "2 GPUs for 4 ranks" in found["pods: GPUs"].text
    assert "ranks have 300 s, and the pod is killed after 300 s" in found["pods: grace"].text
    assert "no ConfigMap" in found["pods: configuration"].text
    found = sizes(Pods(**given), config)
    assert set(found) == {"pods: time to save", "pods: cache"}
    assert found["pods: cache"].advice == "data.remote.cache_bytes=7200000000"
    unlimited = Pods(**{**given, "grace_seconds": None})
    assert sizes(unlimited, config)["pods: time to save"].verdict == "warning"
    unknown = Pods(**{**given, "config": {"nmae": "x"}})
    (finding,) = [f for f in check_pods(unknown, config, world_size=2) if "config" in f.check]
    assert "nmae" in finding.text


def test_quantities_are_those_of_kubernetes() -> None:
    texts = ("512Gi", "100m", 2, "1.5k", "1e3")
    assert [quantity(text) for text in texts] == [512 * GIB, 0.1, 2, 1500, 1000]
    with pytest.raises(ValueError, match="'12 GB' is no quantity"):
        quantity("12 GB")


def test_what_is_no_training_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 training jobs found, needs one"):
        read_pods(K8S / "embed")
    with pytest.raises(ConfigError, match="cannot render it"):
        read_pods(tmp_path)
    path = tmp_path / "all.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pods(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        read_pods(path)
    path.write_text("kind: TrainJob\nmetadata: {name: x}\nspec: {trainer: {numNodes: 2}}")
    with pytest.raises(ConfigError, match="TrainJob x is not as expected"):
        read_pods(path)


def test_the_speed_of_a_disk_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    assert write_speed(tmp_path, size=2**20) > 0
    assert list(tmp_path.iterdir()) == []


def test_the_command_reads_a_folder_and_takes_its_number_of_ranks(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 24)
    tree = config_tree(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    small = {"nodes": 2, "ranks_per_node": 2, "gpus_per_node": 0, "memory": "64Gi"}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"train": small}))
    made = CliRunner().invoke(
        app,
        ["k8s", "render", str(path), "data.shards=/data/shards", "--values",
         str(tmp_path / "values.yaml"), "--base", str(K8S), "--out", str(tmp_path / "build")],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    arguments = ["doctor", str(path), "--manifests", str(tmp_path / "build/train")]
    done = CliRunner().invoke(app, [*arguments, "--write-mb", "100"])
    assert done.exit_code == 0, done.output
    assert "ok       pods: ranks: Job of 2 nodes x 2 ranks = 4" in done.output
    assert "12 a step = 4 ranks x 1 micro-batches x 3" in done.output
    assert "ok       pods: memory: " in done.output
    assert "at 100 MB/s" in done.output
    done = CliRunner().invoke(app, [*arguments, "--world-size", "3", "optim.lr=0.5"])
    assert done.exit_code == 1
    assert "problem  pods: ranks" in done.output
    assert "optim.lr=" in done.output
