"""Every kustomization renders, fits the schemas, and gives its pods no rights."""

import copy
from pathlib import Path

import pytest
from kubernetes_validate import ValidationError

from tests.k8s.manifests import (
    K8S,
    KSERVE,
    MILVUS_VERSION,
    RUNTIME,
    TRAINJOB,
    Manifest,
    only,
    pod_of,
    rendered,
    validate,
)
from tests.k8s.other_kinds import PACKAGES, kserve_models, prometheus_models, unknown_fields

FOLDERS = sorted(
    str(path.parent.relative_to(K8S))
    for path in K8S.glob("**/kustomization.yaml")
    if "components" not in path.parts
)
PODS = {"Deployment", "Job", "StatefulSet", KSERVE, RUNTIME}


def workloads(folder: str) -> list[Manifest]:
    return [document for document in rendered(folder) if document["kind"] in PODS]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_manifest_fits_its_schema_and_has_a_namespace(folder: str) -> None:
    documents = rendered(folder)
    assert documents
    for document in documents:
        validate(document)
        cluster_wide = document["kind"] in {RUNTIME, "Namespace"}
        assert document["metadata"].get("namespace") == (None if cluster_wide else "vlm")


@pytest.mark.parametrize("folder", [f for f in FOLDERS if workloads(f)])
def test_pods_run_without_rights_and_declare_what_they_mount(folder: str) -> None:
    documents = rendered(folder)
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    maps = {d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap"}
    for document in workloads(folder):
        spec = pod_of(document)
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        containers = [*spec["containers"], *spec.get("initContainers", [])]
        for container in containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["image"].endswith((":0.1.0", f"/milvus:v{MILVUS_VERSION}"))
        declared = {volume["name"]: volume for volume in spec["volumes"]}
        own = {t["metadata"]["name"] for t in document["spec"].get("volumeClaimTemplates", [])}
        assert {m["name"] for c in containers for m in c["volumeMounts"]} == set(declared) | own
        for volume in declared.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps
            if "persistentVolumeClaim" in volume and claims:  # else they are another folder's
                assert volume["persistentVolumeClaim"]["claimName"] in claims


def test_the_checks_refuse_what_a_cluster_would() -> None:
    """The models of Trainer ignore unknown fields by themselves."""
    job = copy.deepcopy(only(rendered("train-trainer"), TRAINJOB))
    job["spec"]["trainer"]["numberOfNodes"] = 3
    with pytest.raises(AssertionError, match="no such fields: numberOfNodes"):
        validate(job)
    runtime = copy.deepcopy(rendered("train-trainer/runtimes")[0])
    pod_of(runtime)["containers"][0]["enviroment"] = []
    with pytest.raises((AssertionError, ValidationError)):
        validate(runtime)
    cluster = copy.deepcopy(only(rendered("milvus-cluster"), "Milvus"))
    cluster["spec"]["components"]["queryNode"]["replica"] = 2
    with pytest.raises(AssertionError, match="no such fields: replica$"):
        validate(cluster)
    deployment = copy.deepcopy(only(rendered("serve"), "Deployment"))
    deployment["spec"]["replikas"] = 2
    with pytest.raises(ValidationError):
        validate(deployment)


@pytest.mark.skipif(not PACKAGES.is_dir(), reason="`make build/kinds` puts the models there")
def test_fields_that_other_projects_kinds_do_not_have_are_found() -> None:
    service = copy.deepcopy(only(rendered("serve-kserve"), KSERVE))
    service["spec"]["predictor"]["autoScaling"] = {"metrics": [{"tipe": "Resource"}]}
    assert unknown_fields(service, "V1beta1InferenceService", kserve_models()) == [
        ".spec.predictor.autoScaling.metrics.0.tipe"
    ]
    rule = copy.deepcopy(only(rendered("observability"), "PrometheusRule"))
    rule["spec"]["groups"][0]["rules"][1]["annotation"] = {}
    monitor = copy.deepcopy(only(rendered("observability"), "PodMonitor"))
    monitor["spec"]["endpoints"] = []
    for document, where in (
        (rule, ".spec.groups.0.rules.1.annotation"),
        (monitor, ".spec.endpoints"),
    ):
        assert unknown_fields(document, document["kind"], prometheus_models()) == [where]


@pytest.mark.parametrize("component", sorted((K8S / "components").iterdir()), ids=lambda p: p.name)
def test_every_component_is_used_by_an_overlay(component: Path) -> None:
    used = [p.read_text() for p in K8S.glob("overlays/*/kustomization.yaml")]
    assert any(f"components/{component.name}" in text for text in used)


def test_everything_of_the_demo_can_be_applied_part_by_part() -> None:
    """README.md selects by `-l app=NAME`; what has no such label would never be applied."""
    parts = {d["metadata"]["labels"]["app"] for d in rendered("overlays/dev")}
    assert parts == {"data", "train", "export", "index", "serve"}
