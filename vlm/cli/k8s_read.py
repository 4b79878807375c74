"""A training job's manifests as a cluster would get them, in the few figures that matter here."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import ConfigError

__all__ = ["Pods", "quantity", "read_pods"]

_SUFFIXES = {
    "m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50,
}  # fmt: skip
_GPU = "nvidia.com/gpu"
Tree = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pods:
    """One training job; None where its manifests do not say."""

    kind: str
    nodes: int
    pods: int
    """As many as are started; it should be `nodes`, which torchrun waits for."""
    ranks_per_node: int
    gpus: int
    """Of each node."""
    memory: float | None
    """Limit of each node, bytes."""
    save_seconds: float | None
    """From SIGTERM until torchrun kills its ranks."""
    grace_seconds: float | None
    """From SIGTERM until Kubernetes kills the pod."""
    volumes: dict[str, float]
    """Bytes that claims ask for, by the path where they are mounted."""
    cache: float | None
    """Limit of /cache, bytes."""
    config: Tree | None
    """The run's YAML in its ConfigMap."""

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.nodes * self.ranks_per_node


def read_pods(path: Path) -> Pods:
    """The training job in a kustomization's folder, or in a file of rendered YAML.

    Raises:
        ConfigError: If there is none, or more than one, or kubectl cannot render the folder.
    """
    text = _kustomize(path) if path.is_dir() else _read(path)
    try:
        documents = [d for d in yaml.safe_load_all(text) if isinstance(d, dict)]
    except yaml.YAMLError as error:
        message = f"{path}: not YAML: {error}"
        raise ConfigError(message) from error
    found = [document for document in documents if _trains(document)]
    if len(found) != 1:
        message = (
            f"{path}: {len(found)} training jobs found, needs one: a TrainJob, or a Job whose "
            f"command is vlm.distributed.launch; `vlm k8s render CONFIG` writes build/k8s/train"
        )
        raise ConfigError(message)
    (job,) = found
    try:
        return _of_job(job, documents) if job["kind"] == "Job" else _of_trainjob(job, documents)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        message = f"{path}: {job['kind']} {job['metadata']['name']} is not as expected: {error!r}"
        raise ConfigError(message) from error


def quantity(text: str | int | float) -> float:
    """A number of Kubernetes, such as 512Gi, 100m or 2.

    Raises:
        ValueError: If it is none.
    """
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]{0,2})", str(text))
    if match is None or match[2] not in _SUFFIXES:
        message = f"{text!r} is no quantity such as 512Gi or 100m"
        raise ValueError(message)
    return float(match[1]) * _SUFFIXES[match[2]]


def _kustomize(folder: Path) -> str:
    beside = str(Path(sys.executable).parent)
    tool = shutil.which("kubectl") or shutil.which("kubectl", path=beside)
    if tool is None:
        message = (
            f"{folder}: kubectl, which renders a folder, is not on the PATH; install it, or give "
            f"a file of what it prints: kubectl kustomize {folder} > all.yaml"
        )
        raise ConfigError(message)
    done = subprocess.run(
        [tool, "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        message = f"{folder}: kubectl cannot render it: {done.stderr.strip()}"
        raise ConfigError(message)
    return done.stdout


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path}: cannot be read: {error}"
        raise ConfigError(message) from error


def _trains(document: Tree) -> bool:
    if document.get("kind") == "TrainJob":
        return True
    if document.get("kind") != "Job":
        return False
    (container, *_) = document["spec"]["template"]["spec"]["containers"]
    return "vlm.distributed.launch" in container.get("command", [])


def _of_job(job: Tree, documents: list[Tree]) -> Pods:
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    variables = _variables(container)
    limits = container.get("resources", {}).get("limits", {})
    return Pods(
        kind="Job",
        nodes=int(variables["PET_NNODES"]),
        pods=int(job["spec"]["completions"]),
        ranks_per_node=int(variables["PET_NPROC_PER_NODE"]),
        gpus=int(limits.get(_GPU) or 0),
        memory=_optional(limits.get("memory")),
        save_seconds=_optional(variables.get("PET_SHUTDOWN_TIMEOUT")),
        grace_seconds=_optional(pod.get("terminationGracePeriodSeconds")),
        cache=_cache(pod, container),
        **_given(pod, container, documents),
    )


def _of_trainjob(job: Tree, documents: list[Tree]) -> Pods:
    trainer = job["spec"]["trainer"]
    limits = trainer.get("resourcesPerNode", {}).get("limits", {})
    (patch, *_) = job["spec"]["runtimePatches"]
    (node, *_) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    return Pods(
        kind="TrainJob",
        nodes=int(trainer["numNodes"]),
        pods=int(trainer["numNodes"]),
        ranks_per_node=int(trainer["numProcPerNode"]),
        gpus=int(limits.get(_GPU) or 0),
        memory=_optional(limits.get("memory")),
        save_seconds=_optional(_variables(trainer).get("PET_SHUTDOWN_TIMEOUT")),
        grace_seconds=_optional(pod.get("terminationGracePeriodSeconds")),
        cache=None,  # of the runtime, which is another folder's
        **_given(pod, pod["containers"][0], documents),
    )


def _variables(container: Tree) -> dict[str, str]:
    return {e["name"]: str(e["value"]) for e in container.get("env", []) if "value" in e}


def _optional(value: Any) -> float | None:
    return None if value is None else quantity(value)


def _mounted(pod: Tree, container: Tree, kind: str) -> Iterator[tuple[str, Tree]]:
    """Volumes of a kind with the path where the trainer sees them."""
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for mount in container.get("volumeMounts", []):
        volume = volumes.get(mount["name"], {})
        if kind in volume:
            yield str(mount["mountPath"]), dict(volume[kind])


def _cache(pod: Tree, container: Tree) -> float | None:
    folders = dict(_mounted(pod, container, "emptyDir"))
    return _optional(folders.get("/cache", {}).get("sizeLimit"))


def _given(pod: Tree, container: Tree, documents: list[Tree]) -> dict[str, Any]:
    """Sizes of claims that are among the documents, and the run's YAML."""
    named = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    volumes = {}
    for path, source in _mounted(pod, container, "persistentVolumeClaim"):
        claim = named.get(("PersistentVolumeClaim", source["claimName"]))
        if claim is not None:
            volumes[path] = quantity(claim["spec"]["resources"]["requests"]["storage"])
    config = None
    for _, source in _mounted(pod, container, "configMap"):
        text = named.get(("ConfigMap", source["name"]), {}).get("data", {}).get("train.yaml")
        config = config if text is None else yaml.safe_load(text)
    return {"volumes": volumes, "config": config}
