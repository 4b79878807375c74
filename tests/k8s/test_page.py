"""What README.md tells a newcomer to type: every folder, object, verb and option is there."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
import yaml
from typer.testing import CliRunner

from tests.k8s.manifests import K8S, rendered
from vlm.cli.main import app

ROOT = K8S.parent
EXAMPLE = str(K8S / "train/train.yaml")


def commands() -> list[list[str]]:
    """The words of every command in the page's shell blocks."""
    page = (K8S / "README.md").read_text()
    text = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    lines = [part for line in text.splitlines() for part in line.split(" && ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's `vlm k8s render` writes, of the example run and with Milvus."""
    folder = tmp_path_factory.mktemp("build")
    values = yaml.safe_load((K8S / "values.yaml").read_text())
    values["serve"]["milvus"] = "http://milvus:19530"
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    lines = {tuple(words[3:]) for words in commands() if words[:3] == ["vlm", "k8s", "render"]}
    (shown,) = lines  # it is the same line each time
    arguments = [EXAMPLE if word.endswith("RUN.yaml") else word for word in shown]
    places = ["--values", str(folder / "values.yaml"), "--base", str(K8S), "--out", str(folder)]
    done = CliRunner().invoke(app, ["k8s", "render", *arguments, *places])
    assert done.exit_code == 0, done.output
    return folder


def folders() -> set[str]:
    return {
        words[words.index("-k") + 1] for words in commands() if words[:2] == ["kubectl", "apply"]
    }


def place(folder: str, built: Path) -> Path:
    inside = folder.removeprefix("build/k8s/")
    return built / inside if inside != folder else ROOT / folder


def test_every_folder_that_is_applied_renders_and_every_selection_finds_something(
    built: Path,
) -> None:
    steps = {"train", "export", "serve", "embed", "index"}
    assert {f"build/k8s/{step}" for step in steps} <= folders()
    assert {p.name for p in built.iterdir() if p.is_dir()} == steps
    for folder in folders():
        assert rendered(place(folder, built))
    for words in commands():
        if words[:2] == ["kubectl", "apply"] and "-l" in words:
            key, _, value = words[words.index("-l") + 1].partition("=")
            found = rendered(place(words[words.index("-k") + 1], built))
            assert [d for d in found if d["metadata"]["labels"].get(key) == value], words


def test_every_object_that_is_named_is_one_that_was_applied(built: Path) -> None:
    kinds = {"job": "Job", "deployment": "Deployment", "service": "Service",
             "statefulset": "StatefulSet"}  # fmt: skip
    applied = {
        (document["kind"], document["metadata"]["name"])
        for folder in [*folders(), "k8s/serve-green"]
        for document in rendered(place(folder, built))
    }
    named = {
        (kinds[match[1]], match[2])
        for words in commands()
        if words[0] == "kubectl"
        for word in words
        if (match := re.fullmatch(r"(job|deployment|service|statefulset)/([\w-]+)", word))
    }
    assert len(named) >= 8
    assert named <= applied


def test_every_verb_and_option_of_ours_exists() -> None:
    shown = [words[1:] for words in commands() if words[0] == "vlm"]
    assert {words[0] for words in shown} >= {"k8s", "doctor"}
    for words in shown:
        command: click.Command = typer.main.get_command(app)  # type: ignore[assignment]  # typer's own copy of click
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_the_demo_makes_its_volumes_before_what_needs_them() -> None:
    claims = [d for d in rendered("overlays/dev") if d["kind"] == "PersistentVolumeClaim"]
    first = {d["metadata"]["name"]: d["metadata"]["labels"]["app"] for d in claims}
    assert first == {"train-data": "data", "train-runs": "data", "serve-index": "serve"}
    order = [
        w[w.index("-l") + 1].removeprefix("app=") for w in commands() if "-l" in w and "-k" in w
    ]
    assert order == ["data", "train", "export", "serve", "index"]
