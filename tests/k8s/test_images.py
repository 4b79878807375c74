"""The Dockerfiles: linted, without root, and made of what the repository has."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from serving.settings import ServingSettings
from tests.k8s.manifests import K8S, only, pod_of, rendered

ROOT = K8S.parent
DOCKERFILES = sorted((K8S / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.stem)
def test_hadolint_finds_nothing(path: Path) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.stem)
def test_an_image_copies_what_is_there_and_runs_without_root(path: Path) -> None:
    text = path.read_text()
    sources = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    sent = set(path.with_name(f"{path.name}.dockerignore").read_text().splitlines())
    for source in [name for line in sources for name in line.split()]:
        assert (ROOT / source).exists()
        assert f"!{source}" in sent
    stages = text.split("\nFROM ")
    assert len(stages) == 3  # the text before the first, the build and the image
    assert "pip install" not in stages[-1]
    assert "-c constraints.txt" in stages[1]
    user = re.findall(r"^USER (\d+)", stages[-1], re.MULTILINE)
    pod = pod_of(only(rendered("serve"), "Deployment"))
    assert user == [str(pod["securityContext"]["runAsUser"])]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = re.findall(r"^ARG EXTRAS=(\S+)", text, re.MULTILINE)
    assert set(wanted.split(",")) <= set(extras["optional-dependencies"])


def test_the_health_check_asks_the_port_and_route_of_the_server() -> None:
    text = (K8S / "docker/serve.Dockerfile").read_text()
    assert f"127.0.0.1:{ServingSettings().port}/readyz" in text
    probe = pod_of(only(rendered("serve"), "Deployment"))["containers"][0]["readinessProbe"]
    assert probe["httpGet"]["path"] == "/readyz"


def test_every_image_that_a_manifest_names_has_a_dockerfile() -> None:
    built = {path.stem for path in DOCKERFILES}
    for path in K8S.glob("**/*.yaml"):
        for name in re.findall(r"image: (vlm[\w-]*)", path.read_text()):
            assert name.removeprefix("vlm-") in built
