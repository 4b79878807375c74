"""What `vlm k8s render` writes is valid, and agrees with the training YAML and the values."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serving.settings import ServingSettings
from tests.k8s.manifests import (
    K8S,
    TRAINJOB,
    Manifest,
    config_file,
    environment,
    only,
    pod_of,
    rendered,
    validate,
)
from vlm.cli.k8s import _check, render_training
from vlm.cli.k8s_jobs import render_embedding, render_export, render_index
from vlm.cli.k8s_serving import render_serving
from vlm.cli.k8s_values import ClusterValues
from vlm.cli.main import app
from vlm.config import load_config, validate_config
from vlm.errors import ConfigError
from vlm.train import TrainConfig

RUN = K8S / "train/train.yaml"


def values(**changes: Any) -> ClusterValues:
    tree = yaml.safe_load((K8S / "values.yaml").read_text())
    for key, change in changes.items():
        tree[key] = {**tree[key], **change} if isinstance(change, dict) else change
    return validate_config(ClusterValues, tree, source="values")


def written(folder: Path, files: dict[str, str]) -> list[Manifest]:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    documents = rendered(folder)
    for document in documents:
        validate(document)
    return documents


def base_of(folder: Path) -> str:
    return os.path.relpath(K8S, folder)


def test_the_values_file_shows_every_default() -> None:
    assert values() == ClusterValues()


def test_a_job_has_the_ranks_the_engine_and_the_paths_of_its_config(tmp_path: Path) -> None:
    chosen = values(
        namespace="vision",
        images={"train": "registry.example.org:5000/vlm-train:1.2"},
        train={"nodes": 4, "ranks_per_node": 2, "gpus_per_node": 0, "queue": "night", "cpu": "8",
               "save_seconds": 600, "storage_class": "shared", "memory": "24Gi",
               "metrics": True},
    )  # fmt: skip
    training = load_config(TrainConfig, RUN, ["loss.0.type=clip", "optim.lr=0.0003"])
    files = render_training(training, chosen, base=base_of(tmp_path / "train"))
    documents = written(tmp_path / "train", files)
    job = only(documents, "Job")
    (container,) = pod_of(job)["containers"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert environment(container)["PET_NNODES"] == "4"
    assert environment(container)["PET_NPROC_PER_NODE"] == "2"
    assert environment(container)["PET_SHUTDOWN_TIMEOUT"] == "600"
    assert environment(container)["PET_RDZV_BACKEND"] == "c10d"  # of the base
    assert pod_of(job)["terminationGracePeriodSeconds"] == 630
    assert container["image"] == "registry.example.org:5000/vlm-train:1.2"
    (metrics,) = pod_of(job)["initContainers"]
    assert metrics["image"] == container["image"]
    assert container["resources"]["limits"] == {"memory": "24Gi"}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "night"
    assert job["spec"]["suspend"] is True
    assert {d["metadata"]["namespace"] for d in documents} == {"vision"}
    claims = [d["spec"] for d in documents if d["kind"] == "PersistentVolumeClaim"]
    assert {claim["storageClassName"] for claim in claims} == {"shared"}
    tree = yaml.safe_load(config_file(documents, "train-config", "train.yaml"))
    assert validate_config(TrainConfig, tree, source="rendered") == training


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_job_of_trainer_asks_for_the_runtime_of_its_engine(tmp_path: Path, engine: str) -> None:
    chosen = values(train={"runner": "trainer", "nodes": 3, "ranks_per_node": 4,
                           "gpus_per_node": 4, "save_seconds": 900})  # fmt: skip
    training = load_config(TrainConfig, RUN, [f"engine={{type: {engine}}}", "global_batch=120"])
    files = render_training(training, chosen, base=base_of(tmp_path / "train"))
    spec = only(written(tmp_path / "train", files), TRAINJOB)["spec"]
    assert spec["runtimeRef"]["name"] == f"vlm-{engine}"
    assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (3, 4)
    assert spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "4"
    (patch,) = spec["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 930
    assert {volume["name"] for volume in pod["volumes"]} == {"config", "data", "runs"}


def test_the_server_has_the_bundle_and_the_scale_of_the_values(tmp_path: Path) -> None:
    chosen = values(serve={"bundle": "gs://b/x", "fingerprint": "a" * 64, "collection": "next",
                           "min_replicas": 3, "max_replicas": 30, "memory": "6Gi"})  # fmt: skip
    documents = written(tmp_path / "s", render_serving(chosen, base=base_of(tmp_path / "s")))
    assert config_file(documents, "serve-bundle", "BUNDLE_URL") == "gs://b/x"
    assert config_file(documents, "serve-bundle", "BUNDLE_FINGERPRINT") == "a" * 64
    scaler = only(documents, "HorizontalPodAutoscaler")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 30)
    text = config_file(documents, "serve-config", "serving.yaml")
    rendered_settings = validate_config(ServingSettings, yaml.safe_load(text), source="x")
    own = load_config(ServingSettings, K8S / "serve/serving.yaml", [])
    assert rendered_settings == own.model_copy(update={"index": Path("/index/next")})
    limits = pod_of(only(documents, "Deployment"))["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "6Gi"}


@pytest.mark.parametrize(
    ("overrides", "train", "said"),
    [
        (["global_batch=100"], {}, "does not divide over 2 nodes of 8 ranks"),
        (["data.shards=photos"], {}, "photos: not there in a pod, which has /data and /runs"),
    ],
)
def test_what_cannot_run_is_refused_before_the_cluster_sees_it(
    overrides: list[str], train: dict[str, Any], said: str
) -> None:
    training = load_config(TrainConfig, RUN, overrides)
    with pytest.raises(ConfigError, match=said):
        _check(training, values(train=train).train)


def test_values_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="each rank drives one GPU"):
        values(train={"gpus_per_node": 4})
    with pytest.raises(ConfigError, match="choose runner=job"):
        values(train={"metrics": True, "runner": "trainer"})
    with pytest.raises(ConfigError, match="max_replicas=1 is less"):
        values(serve={"max_replicas": 1})
    with pytest.raises(ConfigError, match="images.train"):
        values(images={"train": "no-tag"})


def test_the_verb_writes_folders_and_says_how_to_apply_them(tmp_path: Path) -> None:
    arguments = [
        "k8s",
        "render",
        str(RUN),
        "--values",
        str(K8S / "values.yaml"),
        "--base",
        str(K8S),
    ]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert f"kubectl apply -k {tmp_path}/train" in done.output
    assert {document["kind"] for document in rendered(tmp_path / "serve")} >= {"Deployment"}
    job = only(rendered(tmp_path / "train"), "Job")
    assert pod_of(job)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_the_jobs_between_training_and_serving_pass_on_what_each_made(tmp_path: Path) -> None:
    chosen = values(
        namespace="vision",
        images={"train": "registry.example.org/vlm-train:1.2"},
        embed={"pods": 3, "gpu": True},
        serve={"bundle": "s3://b/x", "fingerprint": "b" * 64, "collection": "next-one",
               "milvus": "http://vlm-milvus:19530"},
    )  # fmt: skip
    training = load_config(TrainConfig, RUN, ["name=big", "data.shards=s3://b/shards"])
    made = {}
    for name, render in (
        ("export", render_export), ("embed", render_embedding), ("index", render_index),
    ):  # fmt: skip
        folder = tmp_path / name
        documents = written(folder, render(training, chosen, base=base_of(folder)))
        assert {d["metadata"]["namespace"] for d in documents} == {"vision"}
        pod = pod_of(only(documents, "Job"))
        images = {c["image"] for c in [*pod["containers"], *pod.get("initContainers", [])]}
        assert images == {"registry.example.org/vlm-train:1.2"}
        (work,) = [d["data"] for d in documents if "-work-" in d["metadata"]["name"]]
        made[name] = work
    assert made["export"] == {"RUN": "/runs/big", "BUNDLE_URL": "s3://b/x"}
    assert made["embed"]["SHARDS"] == "s3://b/shards"
    assert (made["embed"]["PODS"], made["embed"]["BUNDLE_FINGERPRINT"]) == ("3", "b" * 64)
    assert made["embed"]["OUT"] == made["index"]["SOURCE"] == "/runs/embeddings/big"
    assert made["index"]["BUNDLE"] == "/runs/big/bundle"
    job = only(rendered(tmp_path / "embed"), "Job")
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    assert pod_of(job)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    # The loader writes where the server reads.
    documents = written(tmp_path / "s", render_serving(chosen, base=base_of(tmp_path / "s")))
    server = yaml.safe_load(config_file(documents, "serve-config", "serving.yaml"))
    loader = config_file(rendered(tmp_path / "index"), "index-store", "serving.yaml")
    assert yaml.safe_load(loader) == {"store": server["store"]}
    assert (server["store"]["uri"], server["store"]["prefix"]) == (
        "http://vlm-milvus:19530", "vlm_next_one_",
    )  # fmt: skip
    volumes = pod_of(only(documents, "Deployment"))["volumes"]
    assert "milvus" in [v["secret"]["secretName"] for v in volumes if "secret" in v]
