"""The vector database: what serves, loads and guards it agree with each other and with Milvus."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.settings import ServingSettings
from tests.k8s.manifests import (
    K8S,
    MILVUS_VERSION,
    Manifest,
    config_file,
    environment,
    only,
    pod_of,
    rendered,
)
from vlm.config import validate_config

GRPC = 19530


def policy_of(documents: list[Manifest], name: str) -> dict[str, Any]:
    (found,) = [
        d["spec"]
        for d in documents
        if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == name
    ]
    return dict(found)


def test_the_standalone_server_keeps_everything_on_its_volume_and_asks_who_is_there() -> None:
    documents = rendered("milvus")
    spec = pod_of(only(documents, "StatefulSet"))
    (container,) = spec["containers"]
    variables = environment(container)
    (data,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "data"]
    folders = {name: value for name, value in variables.items() if value.startswith("/var")}
    assert set(folders) == {"ETCD_DATA_DIR", "ROCKSMQ_PATH", "LOCALSTORAGE_PATH"}
    assert {str(Path(folder).parent) for folder in folders.values()} == {data}
    assert len(set(folders.values())) == 3
    assert variables["COMMON_SECURITY_AUTHORIZATIONENABLED"] == "true"
    assert variables["QUERYNODE_SEGCORE_INTERIMINDEX_ENABLEINDEX"] == "false"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": GRPC, "metrics": 9091}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    service = only(documents, "Service")
    assert service["metadata"]["name"] == only(documents, "StatefulSet")["spec"]["serviceName"]
    assert {p["name"]: p["port"] for p in service["spec"]["ports"]} == ports
    # A person saw it wait 1,800 seconds, its default, for another node to take over.
    waits = int(variables["COMMON_GRACEFULSTOPTIMEOUT"])
    assert spec["terminationGracePeriodSeconds"] >= waits + 30


def test_a_cluster_is_set_up_as_the_standalone_server_is() -> None:
    spec = only(rendered("milvus-cluster"), "Milvus")["spec"]
    assert spec["components"]["image"].endswith(MILVUS_VERSION)
    assert spec["config"]["common"]["security"]["authorizationEnabled"] is True
    assert spec["config"]["queryNode"]["segcore"]["interimIndex"]["enableIndex"] is False
    (command,) = [
        pod_of(d)["containers"][0]["command"]
        for d in rendered("milvus-cluster")
        if d["kind"] == "Job"
    ]
    name = only(rendered("milvus-cluster"), "Milvus")["metadata"]["name"]
    assert command[2] == f"http://{name}-milvus:{GRPC}"  # the operator's Service


@pytest.mark.parametrize("folder", ["milvus", "milvus-cluster"])
def test_only_those_who_need_vectors_reach_them(folder: str) -> None:
    documents = rendered(folder)
    rules = policy_of(documents, "milvus")["ingress"]
    apps: set[str] = set()
    for rule in rules:
        for peer in rule["from"]:
            for expression in peer.get("podSelector", {}).get("matchExpressions", []):
                apps |= set(expression["values"])
                assert rule["ports"][0]["port"] in ("grpc", GRPC)
    labels = {
        pod["metadata"]["labels"]["app"]
        for name, kind in (("serve", "Deployment"), ("serve-green", "Deployment"), ("index", "Job"))
        for pod in [only(rendered(name), kind)["spec"]["template"]]
    }
    assert apps == labels | {"milvus-password"}
    kserve = policy_of(rendered("serve-kserve"), "serve")["podSelector"]
    assert {"podSelector": kserve} in [peer for rule in rules for peer in rule["from"]]


def test_server_loader_and_password_use_one_secret_and_one_store() -> None:
    served, loaded = rendered("overlays/production"), rendered("index-milvus")
    settings = yaml.safe_load(config_file(served, "serve-config", "serving.yaml"))
    store = settings["store"]
    assert yaml.safe_load(config_file(loaded, "index-store", "serving.yaml")) == {"store": store}
    (work,) = [d["data"] for d in loaded if d["metadata"]["name"].startswith("index-work-")]
    assert work["INDEX"] == "/config/serving.yaml"  # a YAML file instead of a folder: its store
    assert store["uri"] == f"http://{only(rendered('milvus'), 'Service')['metadata']['name']}:19530"
    jobs = [d for d in rendered("milvus") if d["kind"] == "Job"]
    pods = [pod_of(only(served, "Deployment")), pod_of(only(loaded, "Job")), pod_of(jobs[0])]
    for pod in pods:
        (volume,) = [v for v in pod["volumes"] if "secret" in v]
        assert volume["secret"]["secretName"] == "milvus"
        mounts = pod["containers"][0]["volumeMounts"]
        (mount,) = [m for m in mounts if m["name"] == volume["name"]]
        assert store["token_file"] == f"{mount['mountPath']}/token"
        assert mount["readOnly"]
    command = pods[2]["containers"][0]["command"]
    assert command[2:] == [store["uri"], store["token_file"]]
    egress = policy_of(served, "serve")["egress"]
    (rule,) = [r for r in egress if "to" in r]
    milvus = only(served, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert rule["to"] == [{"podSelector": {"matchLabels": milvus}}]
    assert rule["ports"] == [{"protocol": "TCP", "port": GRPC}]


def test_the_server_knows_the_keys_of_its_store() -> None:
    tree = yaml.safe_load(
        config_file(rendered("overlays/production"), "serve-config", "serving.yaml")
    )
    settings = validate_config(ServingSettings, tree, source="production")
    assert settings.model_dump()["store"]["type"] == "milvus"


def test_the_page_says_how_to_make_the_secrets() -> None:
    page = (K8S / "README.md").read_text()
    made = set(re.findall(r"create secret generic ([\w-]+)", page))
    assert {"milvus", "milvus-storage", "object-store"} <= made
