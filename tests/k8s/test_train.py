"""The training manifests fit the trainer: ranks, exit codes, times and paths."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.manifests import (
    RUNTIME,
    TRAINJOB,
    config_file,
    environment,
    only,
    pod_of,
    rendered,
)
from vlm.cli.train import RESUME_ME
from vlm.config import validate_config
from vlm.distributed import launch
from vlm.train import TrainConfig


def config_of(folder: str) -> TrainConfig:
    tree = yaml.safe_load(config_file(rendered(folder), "train-config", "train.yaml"))
    return validate_config(TrainConfig, tree, source=folder)


def job_specs() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name of the container, job and pod of each way to run."""
    indexed = only(rendered("train"), "Job")
    found = [("train", indexed["spec"], pod_of(indexed))]
    for runtime in rendered("train-trainer/runtimes"):
        (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        found.append(("node", job["template"]["spec"], pod_of(runtime)))
    return found


def test_the_job_is_as_many_ranks_as_its_config_can_divide_over() -> None:
    documents = rendered("train")
    job, service = only(documents, "Job")["spec"], only(documents, "Service")
    spec = pod_of(only(documents, "Job"))
    (container,) = spec["containers"]
    variables = environment(container)
    assert job["completions"] == job["parallelism"] == int(variables["PET_NNODES"])
    ranks = int(variables["PET_NNODES"]) * int(variables["PET_NPROC_PER_NODE"])
    assert config_of("train").global_batch % ranks == 0
    assert spec["subdomain"] == service["metadata"]["name"]
    host, port = variables["PET_RDZV_ENDPOINT"].split(":")
    assert host == f"{only(documents, 'Job')['metadata']['name']}-0.{spec['subdomain']}"
    assert (
        int(port) == container["ports"][0]["containerPort"] == service["spec"]["ports"][0]["port"]
    )
    assert service["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize(("name", "job", "pod"), job_specs(), ids=["job", "torch", "deepspeed"])
def test_exit_codes_restart_preempted_pods_and_fail_mistakes(
    name: str, job: dict[str, Any], pod: dict[str, Any]
) -> None:
    rules = job["podFailurePolicy"]["rules"]
    by_code = {
        code: rule["action"]
        for rule in rules
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert by_code == {2: "FailJob", RESUME_ME: "Ignore"}
    assert launch.RESUME_ME == RESUME_ME
    for rule in rules[:2]:
        assert rule["onExitCodes"]["containerName"] == name == pod["containers"][0]["name"]
    assert {"type": "DisruptionTarget", "status": "True"} in rules[2]["onPodConditions"]
    assert pod["restartPolicy"] == "Never"  # a pod failure policy needs it


@pytest.mark.parametrize(("name", "job", "pod"), job_specs(), ids=["job", "torch", "deepspeed"])
def test_a_signalled_pod_has_time_to_save(
    name: str, job: dict[str, Any], pod: dict[str, Any]
) -> None:
    (container,) = pod["containers"]
    variables = environment(container)
    # A step and a checkpoint fit in it; torchrun's own default is 30 seconds.
    assert int(variables["PET_SHUTDOWN_TIMEOUT"]) >= 300
    assert pod["terminationGracePeriodSeconds"] > int(variables["PET_SHUTDOWN_TIMEOUT"])
    assert variables["PET_MAX_RESTARTS"] == "0"
    assert container["command"] == ["python", "-m", launch.__name__]
    assert container["args"] == ["-m", "vlm", "train", "/config/train.yaml", "--resume"]


@pytest.mark.parametrize("folder", ["train", "train-trainer"])
def test_the_paths_of_the_config_are_mounted(folder: str) -> None:
    documents = rendered(folder)
    config = config_of(folder)
    if folder == "train":
        mounts = pod_of(only(documents, "Job"))["containers"][0]["volumeMounts"]
    else:
        (patch,) = only(documents, TRAINJOB)["spec"]["runtimePatches"]
        (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        patched = job["template"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        own = pod_of(rendered("train-trainer/runtimes")[0])["containers"][0]["volumeMounts"]
        mounts = [*patched, *own]
    paths = {mount["mountPath"]: mount.get("readOnly", False) for mount in mounts}
    (source,) = config.data.all_sources
    assert paths[str(config.output)] is False
    assert paths[str(Path(source.shards).parent)] is True
    assert paths[str(config.data.remote.cache)] is False
    assert "/config" in paths


def test_the_job_of_trainer_uses_a_runtime_that_is_there() -> None:
    reference = only(rendered("train-trainer"), TRAINJOB)["spec"]["runtimeRef"]
    runtimes = rendered("train-trainer/runtimes")
    assert reference["kind"] == RUNTIME
    assert reference["name"] in {runtime["metadata"]["name"] for runtime in runtimes}
    trainer = only(rendered("train-trainer"), TRAINJOB)["spec"]["trainer"]
    ranks = trainer["numNodes"] * trainer["numProcPerNode"]
    assert config_of("train-trainer").global_batch % ranks == 0
    gpus = trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert int(gpus) == trainer["numProcPerNode"]
