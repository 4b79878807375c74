"""The command line as a person meets it: a real process, what it prints and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import drawn_samples, tiny_bundle, write_dataset
from tests.vlm.train.runs import tree


def vlm(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlm", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


def test_help_lists_every_verb() -> None:
    done = vlm("--help")
    assert done.returncode == 0
    for verb in ("data", "train", "evaluate", "export", "index", "serve", "version"):
        assert verb in done.stdout


def test_the_version_is_printed() -> None:
    assert vlm("version").stdout == "0.1.0\n"


@pytest.mark.slow
def test_the_chain_from_a_folder_of_pairs_to_a_searchable_index(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for sample in drawn_samples(32):
        (pairs / f"{sample.key}.png").write_bytes(sample.image)
        (pairs / f"{sample.key}.txt").write_text(sample.text)
    done = vlm("data", "write", pairs, tmp_path / "shards", "--samples-per-shard", 10)
    assert "32 pairs in 4 shards" in done.stdout, done.stderr
    again = vlm("data", "write", pairs, tmp_path / "shards")
    assert (again.returncode, "already holds shards" in again.stderr) == (2, True)
    shown = vlm("data", "show", tmp_path / "shards", "--limit", 1).stdout
    assert "32 samples, 4 shards" in shown
    assert "s00000: 'a red circle'" in shown
    assert "32 samples indexed" in vlm("data", "index", tmp_path / "shards").stdout

    config = tmp_path / "run.yaml"
    settings = tree(tmp_path, steps=6)
    settings["data"]["stream"] = {}
    config.write_text(yaml.safe_dump(settings))
    trained = vlm("train", config, "optim.lr=1e-3", "log_every=3")
    assert trained.returncode == 0, trained.stderr
    assert "step 6/6 loss" in trained.stdout
    assert "samples/s  ETA 0:00" in trained.stdout
    run = tmp_path / "runs" / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == 1e-3

    tasks = tmp_path / "tasks.yaml"
    datasets = {"own": {"type": "shards", "location": str(tmp_path / "shards")}}
    asked = {"datasets": datasets, "tasks": [{"type": "retrieval", "data": "own"}]}
    tasks.write_text(yaml.safe_dump(asked))
    evaluated = vlm("evaluate", run, tasks, "--against", run, "bootstrap.draws=100")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads((run / "evaluation.json").read_text())["results"]["retrieval/own"]
    (compared,) = json.loads((run / "comparison.json").read_text())["differences"].values()
    assert {found["verdict"] for found in compared.values()} == {"no difference shown"}
    assert (run / "evaluation.html").is_file()

    exported = vlm("export", run)
    assert f"written to {run / 'bundle'}" in exported.stdout, exported.stderr
    metrics = json.loads((run / "bundle" / "bundle.json").read_text())["metrics"]
    assert metrics["retrieval/own"]

    indexed = vlm(
        "index", tmp_path / "shards", "--bundle", run / "bundle", "--index", run / "index"
    )
    assert "32 images indexed, 0 were there already" in indexed.stdout, indexed.stderr
    indexed = vlm(
        "index", tmp_path / "shards", "--bundle", run / "bundle", "--index", run / "index"
    )
    assert "0 images indexed, 32 were there already" in indexed.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "missing.yaml"), "missing.yaml: cannot read this configuration"),
        (("evaluate", "."), "neither a run (config.yaml) nor a bundle (bundle.json)"),
        (("export", "."), "no checkpoint here; train it first"),
        (("serve", "nowhere"), "nowhere: not a bundle"),
        (("data", "index", "."), "no .tar shards here"),
        (("data", "show", "."), "not an indexed dataset, manifest.json is missing"),
        (("data", "write", "x.doc", "out"), "expected a folder or a table"),
        (("data", "fetch", "emoji", "--style", "klingon"), "no such style: klingon"),
    ],
)
def test_what_a_person_can_fix_is_said_without_a_traceback(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = vlm(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_an_index_of_another_bundle_is_refused_without_a_traceback(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 8)
    for name, seed in (("a", 0), ("b", 1)):
        tiny_bundle(tmp_path / name, seed=seed)
    index = ("--index", tmp_path / "index")
    assert vlm("index", tmp_path / "shards", "--bundle", tmp_path / "a", *index).returncode == 0
    done = vlm("index", tmp_path / "shards", "--bundle", tmp_path / "b", *index)
    assert done.returncode == 2
    assert "holds vectors of model" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
