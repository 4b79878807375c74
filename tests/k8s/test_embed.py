"""The embedding job shares its work as the verb divides it."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.k8s.manifests import K8S, only, pod_of, rendered
from tests.support import tiny_bundle, write_dataset
from vlm.cli.embed import embed
from vlm.cli.train import RESUME_ME


def test_the_job_gives_the_verb_options_that_it_has_and_as_many_pods_as_there_are() -> None:
    job = only(rendered("embed"), "Job")
    (container,) = pod_of(job)["containers"]
    words = [*container["command"], *container["args"]]
    assert words[:4] == ["python", "-m", "vlm", "embed"]
    options = {word.removeprefix("--") for word in words if word.startswith("--")}
    assert options <= set(inspect.signature(embed).parameters)
    assert words[words.index("--pods") + 1] == "$(PODS)"
    names = set(re.findall(r"\$\((\w+)\)", " ".join(words)))
    env = (K8S / "embed/work.env").read_text()
    assert all(f"\n{name}=" in env for name in names)
    assert f"\nPODS={job['spec']['completions']}\n" in env
    actions = {
        code: rule["action"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {2: "FailJob", RESUME_ME: "Ignore"}


def test_two_pods_embed_a_dataset_which_is_then_indexed_from_the_files(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 12, samples_per_shard=4)
    tiny_bundle(tmp_path / "bundle")

    def vlm(*arguments: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "vlm", *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(K8S.parent), **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = ("embed", "shards", "--bundle", "bundle", "--out", "vectors", "--pods", "2")
    assert "share 1/2: 4 images embedded" in vlm(*command, JOB_COMPLETION_INDEX="0")
    assert "all shares are done" in vlm(*command, JOB_COMPLETION_INDEX="1")
    index = ("index", "vectors", "--bundle", "bundle", "--index", "index")
    assert "12 images indexed, 0 were there already" in vlm(*index)
