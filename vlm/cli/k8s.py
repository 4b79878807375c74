"""`vlm k8s render`: a training YAML and a cluster's values to folders for `kubectl apply -k`.

What is written are kustomizations on top of `k8s/train`, `k8s/serve` and so on, so that everything
in those stays where it can be read, and only what differs is in the new folders.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlm.cli.k8s_jobs import render_embedding, render_export, render_index
from vlm.cli.k8s_parts import Tree, dump, kustomization_of, manifest, storage
from vlm.cli.k8s_serving import render_serving
from vlm.cli.k8s_values import ClusterValues, TrainValues
from vlm.config import load_config
from vlm.errors import ConfigError
from vlm.files import is_url, write_text_whole

if TYPE_CHECKING:
    from vlm.train import TrainConfig

__all__ = ["app", "render_training"]

_MOUNTS = ("/data", "/runs")
_GRACE_SECONDS = 30

app = typer.Typer(help="Manifests for Kubernetes.")


@app.callback()
def k8s() -> None:
    """Manifests for Kubernetes."""


@app.command()
def render(
    config: Annotated[Path, typer.Argument(help="A training YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value")] = None,
    values: Annotated[Path, typer.Option(help="The cluster's values.")] = Path("k8s/values.yaml"),
    base: Annotated[Path, typer.Option(help="The folder with train and serve.")] = Path("k8s"),
    out: Annotated[Path, typer.Option(help="Where the folders go.")] = Path("build/k8s"),
) -> None:
    """Write OUT/train, export, embed, serve and index, which agree with CONFIG and each other.

    In the cluster, runs go to /runs and fetched shards to /cache, whatever CONFIG says.
    """
    from vlm.train import TrainConfig  # noqa: PLC0415 - torch costs seconds

    settings = load_config(ClusterValues, values, [])
    places = ["output=/runs", "data.remote.cache=/cache"]
    training = load_config(TrainConfig, config, [*places, *(overrides or [])])
    _check(training, settings.train)
    written = {
        "train": render_training(training, settings, base=_from(out / "train", base)),
        "export": render_export(training, settings, base=_from(out / "export", base)),
        "embed": render_embedding(training, settings, base=_from(out / "embed", base)),
        "serve": render_serving(settings, base=_from(out / "serve", base)),
        "index": render_index(training, settings, base=_from(out / "index", base)),
    }
    for name, files in written.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            write_text_whole(out / name / file, text)
        Console(soft_wrap=True).print(f"kubectl apply -k {out / name}", highlight=False)


def render_training(training: "TrainConfig", values: ClusterValues, *, base: str) -> dict[str, str]:
    """Files of a kustomization, by name.

    Args:
        training: The run.
        values: The cluster.
        base: Path from the folder to `k8s`.
    """
    train = values.train
    is_job = train.runner == "job"
    patch = _job(train) if is_job else _trainjob(train, training.engine.type)
    kustomization = kustomization_of(values) | {
        "resources": [f"{base}/{'train' if is_job else 'train-trainer'}"],
        "components": [f"{base}/components/{name}" for name in _components(train)],
        "configMapGenerator": [
            {"name": "train-config", "behavior": "replace", "files": ["train.yaml"]}
        ],
        "patches": [
            {"path": "size.yaml"},
            *storage("train-data", train.data, train.storage_class),
            *storage("train-runs", train.runs, train.storage_class),
            *([] if is_job else [_grace(train)]),
            *(_queue(train.queue, patch["kind"]) if train.queue else []),
        ],
    }
    tree = training.model_dump(mode="json", exclude_unset=True)
    return {
        "kustomization.yaml": dump(kustomization),
        "size.yaml": dump(patch),
        "train.yaml": dump(tree),
    }


def _components(train: TrainValues) -> list[str]:
    gpu = ["gpu"] if train.runner == "job" and train.gpus_per_node else []
    return gpu + (["train-metrics"] if train.metrics else [])


def _check(training: "TrainConfig", train: TrainValues) -> None:
    if training.global_batch % train.ranks:
        message = (
            f"global_batch={training.global_batch} does not divide over {train.nodes} nodes of "
            f"{train.ranks_per_node} ranks; choose a multiple of {train.ranks}, or other nodes"
        )
        raise ConfigError(message)
    paths = [source.shards for source in training.data.all_sources if not is_url(source.shards)]
    if training.teacher is not None:
        paths.append(str(training.teacher.bundle))
    lost = [path for path in paths if not path.startswith(tuple(f"{m}/" for m in _MOUNTS))]
    if lost:
        message = (
            f"{', '.join(lost)}: not there in a pod, which has {' and '.join(_MOUNTS)}; copy it to "
            f"that volume and give its path there, e.g. data.shards=/data/shards, or give a URL"
        )
        raise ConfigError(message)


def _job(train: TrainValues) -> Tree:
    variables = {
        "PET_NNODES": train.nodes,
        "PET_NPROC_PER_NODE": train.ranks_per_node,
        "PET_SHUTDOWN_TIMEOUT": train.save_seconds,
    }
    container = {
        "name": "train",
        "env": [{"name": name, "value": str(value)} for name, value in variables.items()],
        "resources": _resources(train),
    }
    pod = {
        "terminationGracePeriodSeconds": train.save_seconds + _GRACE_SECONDS,
        "containers": [container],
    }
    spec = {"completions": train.nodes, "parallelism": train.nodes, "template": {"spec": pod}}
    return manifest("batch/v1", "Job", "train") | {"spec": spec}


def _trainjob(train: TrainValues, engine: str) -> Tree:
    trainer = {
        "numNodes": train.nodes,
        "numProcPerNode": train.ranks_per_node,
        "resourcesPerNode": _resources(train),
        "env": [{"name": "PET_SHUTDOWN_TIMEOUT", "value": str(train.save_seconds)}],
    }
    runtime = "vlm-deepspeed" if engine == "deepspeed" else "vlm-torch"
    return manifest("trainer.kubeflow.org/v1alpha1", "TrainJob", "train") | {
        "spec": {"runtimeRef": {"name": runtime}, "trainer": trainer}
    }


def _grace(train: TrainValues) -> Tree:
    """A list of a kind that kustomize does not know is replaced by a merge, so add by path."""
    pod = "replicatedJobs/0/template/spec/template/spec"
    operation = {
        "op": "add",
        "path": f"/spec/runtimePatches/0/trainingRuntimeSpec/template/spec/{pod}/"
        "terminationGracePeriodSeconds",
        "value": train.save_seconds + _GRACE_SECONDS,
    }
    return {"target": {"kind": "TrainJob", "name": "train"}, "patch": dump([operation])}


def _resources(train: TrainValues) -> Tree:
    limits: Tree = {"memory": train.memory}
    if train.gpus_per_node:
        limits["nvidia.com/gpu"] = str(train.gpus_per_node)
    elif train.runner == "trainer":
        limits["nvidia.com/gpu"] = None  # a merge patch removes it so
    return {"requests": {"cpu": train.cpu, "memory": train.memory}, "limits": limits}


def _queue(name: str, kind: str) -> list[Tree]:
    label = {"op": "add", "path": "/metadata/labels/kueue.x-k8s.io~1queue-name", "value": name}
    suspend = {"op": "add", "path": "/spec/suspend", "value": True}
    return [{"target": {"kind": kind, "name": "train"}, "patch": dump([label, suspend])}]


def _from(folder: Path, base: Path) -> str:
    return os.path.relpath(base.resolve(), folder.resolve())
