"""The job on one machine: nodes are processes with the very environment that the manifest sets."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.k8s.manifests import config_file, environment, only, pod_of, rendered
from tests.object_stores import free_port
from tests.serving.conftest import Server
from tests.support import tiny_bundle, write_dataset
from tests.vlm.train.runs import tree
from vlm.inference import push_bundle

ROOT = Path(__file__).parents[2]
NODES = 3
STEPS = 150


def node(index: int, folder: Path, port: int) -> subprocess.Popen[bytes]:
    """What a pod of the job runs; its name and the paths of its volumes are this machine's."""
    (container,) = pod_of(only(rendered("train"), "Job"))["containers"]
    variables = environment(container)
    host, _ = variables["PET_RDZV_ENDPOINT"].split(":")
    given = {
        **variables,
        "PET_NNODES": str(NODES),
        "PET_RDZV_ENDPOINT": variables["PET_RDZV_ENDPOINT"]
        .replace(host, "127.0.0.1")
        .replace("29500", str(port)),
        "PET_LOCAL_ADDR": "127.0.0.1",  # the manifest takes the pod's address
        "JOB_COMPLETION_INDEX": str(index),
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *container["command"][1:], *container["args"]]
    command = [str(folder / "train.yaml") if w == "/config/train.yaml" else w for w in command]
    with (folder / f"node-{index}.log").open("ab") as log:
        return subprocess.Popen(
            command, env=given, cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )


def verdict(code: int) -> str:
    """What the job's failure policy does about a pod that ended with this code."""
    for rule in only(rendered("train"), "Job")["spec"]["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", []):
            return str(rule["action"])
    return "Complete" if code == 0 else "Count"


def lose(process: subprocess.Popen[bytes]) -> None:
    """As a pod's end: whatever it started ends with it, all at once."""
    found = [process.pid]
    for pid in found:  # grows while it is walked; torchrun's workers have sessions of their own
        found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for pid in reversed(found):
        os.kill(pid, signal.SIGKILL)


def end(nodes: list[subprocess.Popen[bytes]]) -> None:
    for process in nodes:
        if process.poll() is None:
            lose(process)
            process.wait()


def steps(folder: Path) -> list[int]:
    path = folder / "runs/run/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def said(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("node-*.log")))


def wait_for_step(
    folder: Path, step: int, nodes: list[subprocess.Popen[bytes]], *, begun: str
) -> None:
    """Until the run that began so has recorded a step; the file may hold older records."""
    deadline = time.monotonic() + 240
    while begun not in said(folder) or max(steps(folder), default=0) < step:
        assert time.monotonic() < deadline, said(folder)[-2000:]
        assert all(process.poll() is None for process in nodes), said(folder)[-2000:]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)  # two times three nodes start, on a machine that may be busy
def test_after_a_lost_node_the_run_goes_on_and_a_preempted_one_saves_for_all(
    tmp_path: Path,
) -> None:
    write_dataset(tmp_path / "shards", 48)
    settings: dict[str, Any] = tree(
        tmp_path, steps=STEPS, checkpoint_every=10, log_every=5, ema_decay=None
    )
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))

    # A node is lost: its neighbours cannot go on, and end to be started again.
    port = free_port()
    nodes = [node(index, tmp_path, port) for index in range(NODES)]
    try:
        wait_for_step(tmp_path, 15, nodes, begun="from scratch")
        lose(nodes[2])
        codes = [process.wait(120) for process in nodes]
    finally:
        end(nodes)
    assert codes[2] == -signal.SIGKILL
    assert {verdict(code) for code in codes[:2]} <= {"Count", "Ignore"}
    saved = sorted((tmp_path / "runs/run/checkpoints").glob("step-*"))
    reached = int(saved[-1].name.removeprefix("step-"))
    assert reached >= 10

    # All come back; then the cluster wants one node for something else.
    port = free_port()
    nodes = [node(index, tmp_path, port) for index in range(NODES)]
    try:
        wait_for_step(tmp_path, reached + 5, nodes, begun=f"from step {reached},")
        nodes[1].send_signal(signal.SIGTERM)
        codes = [process.wait(120) for process in nodes]
    finally:
        end(nodes)
    assert [verdict(code) for code in codes] == ["Ignore"] * NODES
    saved = sorted((tmp_path / "runs/run/checkpoints").glob("step-*"))
    stopped = int(saved[-1].name.removeprefix("step-"))
    assert reached < stopped < STEPS


@pytest.mark.slow
def test_a_pod_fetches_its_bundle_serves_and_drains_as_the_manifest_says(tmp_path: Path) -> None:
    documents = rendered("serve")
    spec = pod_of(only(documents, "Deployment"))
    (fetch,), (container,) = spec["initContainers"], spec["containers"]
    info = tiny_bundle(tmp_path / "exported")
    push_bundle(tmp_path / "exported", str(tmp_path / "store"))
    work = {"BUNDLE_URL": str(tmp_path / "store"), "BUNDLE_FINGERPRINT": info.fingerprint}

    def local(word: str) -> str:
        for name, value in work.items():
            word = word.replace(f"$({name})", value)
        return word.replace("/models/", f"{tmp_path}/").replace("/index/", f"{tmp_path}/index/")

    command = [sys.executable, *fetch["command"][1:], *fetch["args"]]
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([local(word) for word in command], check=True, env=variables)

    settings = yaml.safe_load(config_file(documents, "serve-config", "serving.yaml"))
    assert container["command"] == ["python", "-m", "serving"]
    overrides = {**settings, "host": "127.0.0.1", "bundle": local(settings["bundle"]),
                 "index": local(settings["index"]), "runtimes": str(tmp_path / "rt")}  # fmt: skip
    del overrides["port"]  # a free one
    server = Server(*(f"{name}={value}" for name, value in overrides.items()))
    try:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert server.client.get(container[probe]["httpGet"]["path"]).status_code == 200
        body = {"input": ["a red circle"] * 64}
        with ThreadPoolExecutor(8) as pool:
            asked = [
                pool.submit(server.client.post, "/v1/embeddings", json=body) for _ in range(24)
            ]
            next(as_completed(asked))
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            answers = [future for future in asked if future.exception() is None]
        server.process.wait(spec["terminationGracePeriodSeconds"])
        taken = time.monotonic() - begun
    finally:
        server.client.close()
        server.stop()
    # Whoever was being answered is; others find the port closed, and are told so at once.
    assert answers
    assert {future.result().status_code for future in answers} == {200}
    lost = [future.exception() for future in asked if future.exception() is not None]
    assert all(isinstance(error, httpx.TransportError) for error in lost)
    assert taken < spec["terminationGracePeriodSeconds"]
