"""Prometheus' own tool reads every rule and every panel, and alerts fire when they should."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.test_observability import OBSERVABILITY, expressions

PROMTOOL = shutil.which("promtool")
pytestmark = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool on the PATH: apt-get install prometheus has it"
)


def promtool(*arguments: str) -> str:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def rules_file(folder: Path) -> Path:
    """The groups of the PrometheusRule, as a file of Prometheus' own."""
    (rules,) = yaml.safe_load_all((OBSERVABILITY / "rules.yaml").read_text())
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": rules["spec"]["groups"]}))
    return path


def test_every_rule_and_every_panel_is_a_query(tmp_path: Path) -> None:
    assert "10 rules found" in promtool("check", "rules", str(rules_file(tmp_path)))
    queries = [
        {"record": f"query:{number}", "expr": text} for number, text in enumerate(expressions())
    ]
    path = tmp_path / "queries.yaml"
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": queries}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", str(path))


def series(text: str, values: str) -> dict[str, str]:
    return {"series": text, "values": values}


def fires(alert: str, at: str, /, **labels: str) -> dict[str, Any]:
    """That an alert fires then with these labels; what it says is not compared."""
    selected = ", ".join(f'{key}="{value}"' for key, value in labels.items())
    query = f'count(ALERTS{{alertname="{alert}", alertstate="firing", {selected}}})'
    return {"expr": query, "eval_time": at, "exp_samples": [{"labels": "{}", "value": 1}]}


def silent(name: str, at: str) -> dict[str, Any]:
    query = f'ALERTS{{alertname="{name}", alertstate="firing"}}'
    return {"expr": query, "eval_time": at, "exp_samples": []}


def test_alerts_fire_after_their_time_and_not_before(tmp_path: Path) -> None:
    """A server that slows down and fails; a run that hangs, is restarted, and starves."""
    of = 'namespace="vlm"'
    requests = f'{of}, route="/v1/search", method="POST"'
    bucket = f'vlm_request_seconds_bucket{{{requests}, status="200"'
    cases = [
        {
            "input_series": [
                # Of 60 requests a minute three take over a second, and three fail.
                series(f'{bucket}, le="1"}}', "0+57x60"),
                series(f'{bucket}, le="5"}}', "0+60x60"),
                series(f'{bucket}, le="+Inf"}}', "0+60x60"),
                series(f'vlm_request_seconds_count{{{requests}, status="200"}}', "0+57x60"),
                series(f'vlm_request_seconds_count{{{requests}, status="500"}}', "0+3x60"),
                series(f'vlm_refusals_total{{{of}, status="503"}}', "0+12x60"),
                series(f'vlm_model_info{{{of}, name="clip", fingerprint="a"}}', "1x60"),
                series(f'vlm_model_info{{{of}, name="clip", fingerprint="b"}}', "1x60"),
            ],
            "promql_expr_test": [
                silent("VlmServingSlow", "5m"),
                fires("VlmServingSlow", "20m", route="/v1/search"),
                fires("VlmServingErrors", "20m", namespace="vlm"),
                fires("VlmServingTurnsAway", "20m", namespace="vlm"),
                silent("VlmServingTwoModels", "20m"),
                fires("VlmServingTwoModels", "40m", name="clip"),
            ],
        },
        {
            "input_series": [
                series(f'vlm_train_record_age_seconds{{{of}, run="clip"}}', "0+60x60"),
                series(f'vlm_train_data_wait_fraction{{{of}, run="clip"}}', "0.3x60"),
            ],
            "promql_expr_test": [
                silent("VlmTrainingStuck", "30m"),
                fires("VlmTrainingStuck", "40m", run="clip"),
                fires("VlmTrainingWaitsForData", "20m", run="clip"),
            ],
        },
        {
            "input_series": [
                # 100 a second, then half of every hour is lost to restarts.
                series(f'vlm_train_samples_per_second{{{of}, run="clip"}}', "100x240"),
                series(f'vlm_train_samples{{{of}, run="clip"}}', "0+6000x60 360000+3000x180"),
            ],
            "promql_expr_test": [
                silent("VlmTrainingGoodput", "60m"),
                fires("VlmTrainingGoodput", "220m", run="clip"),
            ],
        },
    ]  # fmt: skip
    path = tmp_path / "tests.yaml"
    tests = {
        "rule_files": [str(rules_file(tmp_path))],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", **case} for case in cases],
    }
    path.write_text(yaml.safe_dump(tests))
    assert "SUCCESS" in promtool("test", "rules", str(path))
