"""`vlm doctor --manifests`: whether a job's pods are what its run needs."""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.cli.k8s_read import Pods
from vlm.config import validate_config
from vlm.errors import ConfigError
from vlm.files import is_url

if TYPE_CHECKING:
    from vlm.train import TrainConfig
    from vlm.train.doctor import Finding

__all__ = ["check_pods", "check_sizes", "write_speed"]

_GIB = 2**30
_ELSEWHERE = ("output", "data.remote.cache", "teacher.bundle")
"""Paths differ between a pod and the machine that the doctor runs on."""


def check_pods(pods: Pods, config: "TrainConfig", *, world_size: int | None) -> Iterator["Finding"]:
    """Whether ranks, GPUs and the run in the ConfigMap are those that are asked for.

    Args:
        pods: The job.
        config: The run.
        world_size: Ranks that a person expects; None: those of the job.
    """
    text = f"{pods.kind} of {pods.nodes} nodes x {pods.ranks_per_node} ranks"
    figures = {"nodes": pods.nodes, "ranks": pods.ranks}
    if pods.pods != pods.nodes:
        yield _problem(
            "pods: ranks",
            f"{pods.pods} pods are started, and torchrun waits for PET_NNODES={pods.nodes}",
            "completions, parallelism and PET_NNODES must be one number; render again",
        )
    elif world_size not in (None, pods.ranks):
        yield _problem(
            "pods: ranks",
            f"{text} = {pods.ranks}, and --world-size is {world_size}",
            "train.nodes and train.ranks_per_node of the values, then render again",
        )
    else:
        yield _finding("pods: ranks", "ok", f"{text} = {pods.ranks}", figures=figures)
    if pods.gpus not in (0, pods.ranks_per_node):
        yield _problem(
            "pods: GPUs",
            f"{pods.gpus} GPUs for {pods.ranks_per_node} ranks on each node",
            "each rank drives one GPU: give equal numbers, or none to train on CPUs",
        )
    save, grace = pods.save_seconds, pods.grace_seconds
    if save is not None and grace is not None and grace <= save:
        yield _problem(
            "pods: grace",
            f"after SIGTERM ranks have {save:.0f} s, and the pod is killed after {grace:.0f} s",
            "terminationGracePeriodSeconds must be longer than PET_SHUTDOWN_TIMEOUT",
        )
    yield from _same_run(pods, config)


def check_sizes(
    pods: Pods,
    config: "TrainConfig",
    figures: Mapping[str, Mapping[str, float | int]],
    *,
    on_gpu: bool,
    bytes_per_second: int | float,
) -> Iterator["Finding"]:
    """Whether memory, times and volumes of the pods are enough for what the doctor found.

    Args:
        pods: The job.
        config: The run.
        figures: Of the doctor's findings, by name of the check.
        on_gpu: Whether the doctor's steps ran on a GPU; a step on a CPU says nothing of one.
        bytes_per_second: At which the volume takes a checkpoint.
    """
    if "memory" in figures and pods.memory is not None:
        yield _memory(pods, figures["memory"], figures["disk"]["checkpoint"])
    if "disk" in figures:
        step = 0.0
        if bool(pods.gpus) == on_gpu:
            step = config.global_batch / pods.ranks / figures["loader"]["computed"]
        seconds = figures["disk"]["checkpoint"] / bytes_per_second
        yield _time_to_save(pods, step, seconds, bytes_per_second)
        yield from _volumes(pods, config, figures["disk"]["needed"])


def write_speed(folder: Path, *, size: int = 2**26) -> float:
    """Bytes a second that a folder's disk takes from one writer, with the data made durable."""
    block = os.urandom(2**20)
    path = folder / "speed"
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return size / max(seconds, 1e-6)


def _same_run(pods: Pods, config: "TrainConfig") -> Iterator["Finding"]:
    from vlm.train import TrainConfig  # noqa: PLC0415 - torch costs seconds
    from vlm.train.records import flat  # noqa: PLC0415 - with it

    check = "pods: configuration"
    if pods.config is None:
        yield _problem(check, "no ConfigMap with train.yaml is among the manifests", "render again")
        return
    try:
        theirs = validate_config(TrainConfig, pods.config, source="train.yaml of the ConfigMap")
    except ConfigError as error:
        yield _problem(check, str(error), "render again with this version")
        return
    here, there = flat(config.model_dump(mode="json")), flat(theirs.model_dump(mode="json"))
    differing = [
        f"{key}={there.get(key)} in the pods, {here.get(key)} here"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and key not in _ELSEWHERE and not key.endswith(".shards")
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        text = "; ".join(differing[:3]) + more
        yield _problem(check, text, "vlm k8s render with the same config and overrides")
    else:
        yield _finding(check, "ok", "the run of the ConfigMap is this one")


def _memory(pods: Pods, memory: Mapping[str, float | int], checkpoint: int | float) -> "Finding":
    each = memory["process"] + memory["loader"] if pods.gpus else memory["peak"]
    copy = checkpoint / pods.nodes  # every rank copies its part, and writes it beside the training
    needed = pods.ranks_per_node * each + copy
    assert pods.memory is not None
    text = (
        f"{needed / _GIB:.2f} GiB of the {pods.memory / _GIB:.1f} GiB of a node: "
        f"{pods.ranks_per_node} ranks of {each / _GIB:.2f}, a checkpoint's copy {copy / _GIB:.2f}"
    )
    figures = {"needed": needed, "limit": pods.memory}
    if needed > pods.memory:
        advice = f"train.memory={_round_up(needed / 0.8)} in the values"
        return _finding("pods: memory", "problem", text, advice, figures)
    if needed > 0.9 * pods.memory:
        advice = f"little is left: train.memory={_round_up(needed / 0.8)} in the values"
        return _finding("pods: memory", "warning", text, advice, figures)
    return _finding("pods: memory", "ok", text, figures=figures)


def _time_to_save(
    pods: Pods, step: int | float, save: int | float, bytes_per_second: int | float
) -> "Finding":
    check = "pods: time to save"
    needed = step + save
    counted = f"a step of {step:.1f} s" if step else "a step, not measured on such devices,"
    text = (
        f"{counted} and a checkpoint of {save:.1f} s at {bytes_per_second / 1e6:,.0f} MB/s; after "
        f"SIGTERM ranks have {_seconds(pods.save_seconds)}, the pod {_seconds(pods.grace_seconds)}"
    )
    figures = {"step": step, "checkpoint": save}
    if pods.grace_seconds is None or pods.save_seconds is None:
        advice = "set PET_SHUTDOWN_TIMEOUT and terminationGracePeriodSeconds, or render again"
        return _finding(check, "warning", text, advice, figures)
    advice = f"train.save_seconds={max(30, round(2 * needed))} in the values"
    if needed > pods.save_seconds:
        return _finding(check, "problem", text, advice, figures)
    if 2 * needed > pods.save_seconds:
        return _finding(check, "warning", text, advice, figures)
    return _finding(check, "ok", text, figures=figures)


def _volumes(pods: Pods, config: "TrainConfig", needed: int | float) -> Iterator["Finding"]:
    size = pods.volumes.get("/runs")
    if size is not None:
        text = f"{needed / _GIB:.2f} GiB of checkpoints on the {size / _GIB:.1f} GiB of /runs"
        figures = {"needed": needed, "size": size}
        if needed > size:
            advice = f"train.runs={_round_up(2 * needed)} in the values, or fewer keep_checkpoints"
            yield _finding("pods: volume", "problem", text, advice, figures)
        else:
            yield _finding("pods: volume", "ok", text, figures=figures)
    remote = any(is_url(source.shards) for source in config.data.all_sources)
    if pods.cache is not None and remote and config.data.remote.cache_bytes > pods.cache:
        yield _problem(
            "pods: cache",
            f"data.remote.cache_bytes={config.data.remote.cache_bytes} is more than "
            f"the {pods.cache / _GIB:.1f} GiB of /cache: the pod would be evicted",
            f"data.remote.cache_bytes={int(pods.cache * 0.9)}",
        )


def _seconds(value: float | None) -> str:
    return "no time of their own" if value is None else f"{value:.0f} s"


def _round_up(size: int | float) -> str:
    return f"{-(-int(size) // _GIB)}Gi"


def _problem(check: str, text: str, advice: str) -> "Finding":
    return _finding(check, "problem", text, advice)


def _finding(
    check: str,
    verdict: Any,
    text: str,
    advice: str = "",
    figures: Mapping[str, float | int] | None = None,
) -> "Finding":
    from vlm.train.doctor import Finding  # noqa: PLC0415 - torch costs seconds

    return Finding(
        check=check, verdict=verdict, text=text, advice=advice, figures=dict(figures or {})
    )
