"""The serving manifests say what the server does: ports, probes, times, paths and metrics."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.app import create_app
from serving.metrics import Metrics
from serving.settings import CONFIG_VARIABLE, ServingSettings
from tests.k8s.manifests import (
    K8S,
    KSERVE,
    config_file,
    environment,
    only,
    pod_of,
    rendered,
)
from vlm.cli.main import app as command_line
from vlm.config import validate_config

SERVERS = [("serve", "Deployment"), ("serve-green", "Deployment"), ("serve-kserve", KSERVE)]


def settings_of(folder: str) -> ServingSettings:
    tree = yaml.safe_load(config_file(rendered(folder), "serve-config", "serving.yaml"))
    return validate_config(ServingSettings, tree, source=folder)


def server_of(folder: str, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = pod_of(only(rendered(folder), kind))
    (container,) = spec["containers"]
    return spec, container


@pytest.mark.parametrize(("folder", "kind"), SERVERS)
def test_probes_and_ports_are_those_of_the_server(folder: str, kind: str) -> None:
    _, container = server_of(folder, kind)
    settings = settings_of(folder)
    assert [port["containerPort"] for port in container["ports"]] == [settings.port]
    probes = {name: container[name] for name in container if name.endswith("Probe")}
    known = set(create_app(ServingSettings()).openapi()["paths"])
    for probe in probes.values():
        assert probe["httpGet"]["path"] in known
    assert "ready" in probes["readinessProbe"]["httpGet"]["path"]
    assert "ready" not in probes["livenessProbe"]["httpGet"]["path"]
    assert probes["readinessProbe"]["timeoutSeconds"] > settings.ready_seconds
    assert settings.host == "0.0.0.0"


@pytest.mark.parametrize(("folder", "kind"), SERVERS)
def test_a_pod_has_time_to_drain_before_it_is_killed(folder: str, kind: str) -> None:
    spec, container = server_of(folder, kind)
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > pause + settings_of(folder).drain_seconds


@pytest.mark.parametrize(("folder", "kind"), SERVERS)
def test_the_server_finds_its_settings_bundle_and_collection_on_its_volumes(
    folder: str, kind: str
) -> None:
    spec, container = server_of(folder, kind)
    settings = settings_of(folder)
    assert environment(container)[CONFIG_VARIABLE] == "/config/serving.yaml"
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert settings.runtimes is not None
    for path, writable in ((settings.bundle, False), (settings.index, True)):
        (mount,) = [m for p, m in mounts.items() if Path(p) in Path(path).parents]
        assert mount.get("readOnly", False) is not writable
    assert settings.runtimes.parent == Path("/tmp")
    (fetch,) = spec["initContainers"]
    assert fetch["command"][-1] == str(settings.bundle)
    assert fetch["command"][:3] == ["python", "-m", "vlm"]
    groups = {group.name: group.typer_instance for group in command_line.registered_groups}
    bundle_verbs = groups["bundle"]
    assert bundle_verbs is not None
    names = {c.name or c.callback.__name__ for c in bundle_verbs.registered_commands if c.callback}
    assert fetch["command"][3:5] == ["bundle", "fetch"]
    assert "fetch" in names


def test_the_bundles_address_and_fingerprint_reach_the_init_container() -> None:
    spec, _ = server_of("serve", "Deployment")
    (fetch,) = spec["initContainers"]
    words = " ".join([*fetch["command"], *fetch["args"]])
    names = set(re.findall(r"\$\((\w+)\)", words))
    given = dict(
        line.split("=", 1)
        for line in (K8S / "serve/bundle.env").read_text().splitlines()
        if not line.startswith("#")
    )
    assert names == set(given)
    assert len(given["BUNDLE_FINGERPRINT"]) == 64


@pytest.mark.parametrize("folder", ["serve", "serve-green"])
def test_service_autoscaler_budget_and_policy_are_about_these_pods(folder: str) -> None:
    documents = rendered(folder)
    deployment = only(documents, "Deployment")
    name, labels = deployment["metadata"]["name"], deployment["spec"]["template"]["metadata"]
    labels = labels["labels"]
    service = only(documents, "Service")["spec"]
    scaler = only(documents, "HorizontalPodAutoscaler")["spec"]
    budget = only(documents, "PodDisruptionBudget")["spec"]
    policy = only(documents, "NetworkPolicy")["spec"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["selector"] == labels
    assert budget["selector"]["matchLabels"] == labels
    assert policy["podSelector"]["matchLabels"] == labels
    assert scaler["scaleTargetRef"]["name"] == name
    assert "replicas" not in deployment["spec"]  # else every apply would undo the autoscaler
    assert scaler["minReplicas"] > budget["maxUnavailable"]
    (port,) = deployment["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    assert policy["ingress"][0]["ports"] == [{"protocol": "TCP", "port": port["name"]}]


def test_blue_and_green_share_a_volume_and_never_a_collection() -> None:
    blue, green = settings_of("serve"), settings_of("serve-green")
    assert blue.index != green.index
    assert blue.model_copy(update={"index": green.index}) == green
    assert not [d for d in rendered("serve-green") if d["kind"] == "PersistentVolumeClaim"]


def test_kserve_runs_the_same_pod() -> None:
    spec, container = server_of("serve", "Deployment")
    kserve_spec, kserve = server_of("serve-kserve", KSERVE)
    for key in ("command", "env", "resources", "securityContext", "volumeMounts", "lifecycle"):
        assert kserve[key] == container[key]
    for key in ("volumes", "initContainers", "securityContext", "terminationGracePeriodSeconds"):
        assert kserve_spec[key] == spec[key]
    assert kserve["name"] == "kserve-container"


def test_the_metric_of_the_autoscaler_is_one_of_the_server() -> None:
    exposed = Metrics()
    exposed.queue_items.labels(tower="image").set(1)
    rule = (K8S / "components/queue-metric/adapter-rule.yaml").read_text()
    component = (K8S / "components/queue-metric/kustomization.yaml").read_text()
    assert b"vlm_queue_items{" in exposed.exposition()
    assert "metric: {name: vlm_queue_items}" in component
    assert "vlm_queue_items{" in rule
