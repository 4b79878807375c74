"""Every metric of a rule, a panel or a scaler is one that the code exposes."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from serving.metrics import Metrics
from serving.routes import routers
from tests.k8s.manifests import K8S, only, pod_of, rendered
from vlm.cli.metrics import RunFigures, _folder
from vlm.config import load_config
from vlm.distributed import World
from vlm.errors import ConfigError
from vlm.train import TrainConfig
from vlm.train.telemetry import open_telemetry

OBSERVABILITY = K8S / "observability"


def exposed_by_the_server() -> set[str]:
    metrics = Metrics()
    metrics.requests.labels(method="GET", route="/", status="200").observe(1)
    metrics.stages.labels(stage="wait").observe(1)
    metrics.batch_items.labels(tower="image").observe(1)
    metrics.queue_items.labels(tower="image").set(1)
    metrics.refusals.labels(status="503").inc()
    metrics.model.labels("x", "y", "z").set(1)
    metrics.cache.labels(kind="text", result="hit").inc()
    return samples(metrics.exposition())


def samples(exposition: bytes) -> set[str]:
    return set(re.findall(r"^(\w+)[{ ]", exposition.decode(), re.MULTILINE))


def exposed_by_a_run(folder: Path) -> set[str]:
    """The record that the trainer writes, through the exporter."""
    folder.mkdir(exist_ok=True)
    place = [f"output={folder.parent}", f"name={folder.name}"]
    config = load_config(TrainConfig, K8S / "train/train.yaml", place)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with open_telemetry(
        Console(quiet=True), config, World(), start_step=0, total_steps=9
    ) as telemetry:
        telemetry.report(3, {"loss": 0.5, "logit_scale": 14.0, "modality_gap": 0.2})
    registry = CollectorRegistry()
    registry.register(RunFigures(folder))
    return samples(generate_latest(registry))


def expressions() -> list[str]:
    (rules,) = yaml.safe_load_all((OBSERVABILITY / "rules.yaml").read_text())
    found = [r["expr"] for group in rules["spec"]["groups"] for r in group["rules"]]
    for path in OBSERVABILITY.glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            found += [target["expr"] for target in panel["targets"]]
    return found


def test_every_metric_in_a_rule_or_a_panel_exists(tmp_path: Path) -> None:
    (rules,) = yaml.safe_load_all((OBSERVABILITY / "rules.yaml").read_text())
    recorded = {r["record"] for g in rules["spec"]["groups"] for r in g["rules"] if "record" in r}
    known = exposed_by_the_server() | exposed_by_a_run(tmp_path / "clip") | recorded
    used = {
        name
        for expression in expressions()
        for name in re.findall(r"\b(?:vlm[:_][\w:]+|process_\w+)", expression)
    }
    assert len(used) > 15
    assert used <= known | {"process_resident_memory_bytes"}
    assert used - known <= {"process_resident_memory_bytes"}  # of Linux alone


def test_labels_that_rules_select_by_are_those_of_the_server() -> None:
    server = Metrics()
    assert server.requests._labelnames == ("method", "route", "status")
    assert server.stages._labelnames == ("stage",)
    assert server.batch_items._labelnames == server.queue_items._labelnames == ("tower",)
    assert server.refusals._labelnames == ("status",)
    assert server.model._labelnames == ("name", "fingerprint", "runtime")
    assert server.cache._labelnames == ("kind", "result")
    own = {"namespace", "pod", "run", "le", "name", "fingerprint"}
    known = own | {"method", "route", "status", "stage", "tower", "kind", "result"}
    for expression in expressions():
        for names in re.findall(r"by \(([\w, ]+)\)", expression):
            assert set(names.replace(" ", "").split(",")) <= known
        assert set(re.findall(r"(\w+)=~?\"", expression)) <= known


def test_every_alert_says_what_to_do() -> None:
    (rules,) = yaml.safe_load_all((OBSERVABILITY / "rules.yaml").read_text())
    alerts = [r for g in rules["spec"]["groups"] for r in g["rules"] if "alert" in r]
    assert len(alerts) >= 6
    for alert in alerts:
        assert set(alert["annotations"]) == {"summary", "what_to_do"}
        assert alert["labels"]["severity"] in {"info", "warning", "critical"}


def test_monitors_find_the_pods_and_the_route() -> None:
    documents = rendered("overlays/production")
    endpoint = only(documents, "ServiceMonitor")["spec"]["endpoints"][0]
    service = only([d for d in documents if d["metadata"]["name"] == "serve"], "Service")
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    selector = only(documents, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert selector.items() <= service["metadata"]["labels"].items()
    assert any(getattr(r, "path", "") == endpoint["path"] for x in routers for r in x.routes)
    job = only([d for d in documents if d["metadata"]["name"] == "train"], "Job")
    (sidecar,) = pod_of(job)["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    port = only(documents, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"]
    assert port in {p["name"] for p in sidecar["ports"]}
    (path,) = [m["mountPath"] for m in sidecar["volumeMounts"] if m["name"] == "config"]
    assert sidecar["command"] == ["python", "-m", "vlm", "metrics", f"{path}/train.yaml"]
    run = load_config(TrainConfig, K8S / "train/train.yaml", []).run_folder
    assert _folder(K8S / "train/train.yaml") == run


def test_what_describes_no_run_is_refused(tmp_path: Path) -> None:
    assert _folder(tmp_path) == tmp_path
    path = tmp_path / "train.yaml"
    path.write_text("name: clip")
    with pytest.raises(ConfigError, match="not a training YAML with `output` and `name`"):
        _folder(path)


def test_a_run_that_has_not_begun_or_is_writing_is_no_error(tmp_path: Path) -> None:
    figures = RunFigures(tmp_path / "clip")
    assert list(figures.collect()) == []
    exposed_by_a_run(tmp_path / "clip")
    with (tmp_path / "clip" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    found = {family.name: family.samples[0].value for family in figures.collect()}
    assert found["vlm_train_step"] == 3
    assert found["vlm_train_record_age_seconds"] < 3600
