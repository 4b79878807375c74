"""What `vlm evaluate` makes of its arguments."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.support import tiny_bundle, write_dataset
from vlm.cli.device import usable_device
from vlm.cli.evaluate import _folder, _kind, _load, _require_writable, _sorted, evaluate
from vlm.errors import ConfigError, VlmError


def tasks_file(path: Path, location: str, **more: object) -> Path:
    datasets = {"d": {"type": "shards", "location": location}}
    tasks = [{"type": "retrieval", "data": "d", "name": path.stem}]
    path.write_text(yaml.safe_dump({"datasets": datasets, "tasks": tasks, **more}))
    return path


def test_files_and_overrides_are_told_apart() -> None:
    files, overrides = _sorted(["a.yaml", "seed=2", "b.yml"], [Path("c.yaml")])
    assert [str(file) for file in files] == ["c.yaml", "a.yaml", "b.yml"]
    assert overrides == ["seed=2"]
    assert _sorted([], [])[0] == [Path("configs/evaluate/emoji.yaml")]
    with pytest.raises(ConfigError, match="'bundel': expected a file TASKS.yaml or an override"):
        _sorted(["bundel"], [])


def test_files_are_joined_and_overridden_and_may_not_contradict(tmp_path: Path) -> None:
    one = tasks_file(tmp_path / "one.yaml", "x", seed=1)
    two = tasks_file(tmp_path / "two.yaml", "x")
    found = _load([one, two], ["bootstrap.draws=200"])
    assert [key for key, _ in found.by_key()] == ["retrieval/one", "retrieval/two"]
    assert found.used_datasets() == ["d"]
    assert (found.seed, found.bootstrap.draws) == (1, 200)
    other = tasks_file(tmp_path / "other.yaml", "y")
    with pytest.raises(ConfigError, match=r"other.yaml: dataset 'd' is another one"):
        _load([one, other], [])


def test_a_model_is_told_by_what_its_folder_holds(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    assert _kind(str(tmp_path / "bundle")) == "bundle"
    assert _kind(str(tmp_path / "run")) == "run"
    assert _kind("local-dir:anywhere") == _kind("ViT-B-32/openai") == "open_clip"
    for wrong in (str(tmp_path), "ViT-X-1/none"):
        with pytest.raises(VlmError, match="neither a run .* nor a bundle .* nor a model of open"):
            _kind(wrong)
    assert _folder(str(tmp_path / "bundle"), None) == tmp_path / "bundle-evaluation"
    tiny_bundle(tmp_path / "run/bundle")
    assert _folder(str(tmp_path / "run/bundle"), None) == tmp_path / "run"
    assert _folder(str(tmp_path / "run"), None) == tmp_path / "run"
    assert _folder("ViT-B-32/openai", None) == Path("runs/ViT-B-32-openai")
    assert _folder("local-dir:a/b", None) == Path("a/b-evaluation")
    assert _folder("x", Path("out")) == Path("out")


def test_a_place_or_a_device_that_is_not_there_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(VlmError, match=r"file: results cannot be written there .*choose another"):
        _require_writable(tmp_path / "file")
    assert usable_device("cpu") == "cpu"
    for wrong in ("cupu", f"cuda:{torch.cuda.device_count()}"):
        with pytest.raises(VlmError, match=f"--device {wrong}: cannot be used .*; there is cpu"):
            usable_device(wrong)


def test_a_task_that_cannot_be_done_does_not_cost_the_others(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    write_dataset(tmp_path / "shards", 4)
    path = tasks_file(tmp_path / "t.yaml", str(tmp_path / "shards"))
    tree = yaml.safe_load(path.read_text())
    tree["tasks"].insert(0, {"type": "geometry", "data": "d"})
    tree["tasks"].append({"type": "captioning", "data": "d"})
    path.write_text(yaml.safe_dump(tree))
    out, bundle = tmp_path / "out", str(tmp_path / "bundle")
    with pytest.raises(VlmError, match=r"geometry/d: .*5 pairs, got 4\n  captioning/d: .*no capti"):
        evaluate(bundle, [str(path)], out=out, against=bundle)
    found = json.loads((out / "evaluation.json").read_text())
    assert list(found["results"]) == ["retrieval/t"]
    assert list(found["failures"]) == ["geometry/d", "captioning/d"]
    assert list(json.loads((out / "comparison.json").read_text())["differences"]) == ["retrieval/t"]
    assert "at least 5 pairs, got 4" in (out / "evaluation.html").read_text()
