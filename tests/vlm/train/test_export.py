"""From a run folder to a bundle."""

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tests.support import write_dataset
from tests.vlm.train.runs import (
    configured,
    final_weights,
    quiet,
    run,
)
from vlm.errors import CheckpointError
from vlm.evaluation import embed_shards
from vlm.inference import Encoder, load_bundle
from vlm.train.export import export_run, load_run


@pytest.fixture(autouse=True)
def _dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 64)


def test_an_exported_run_is_a_bundle_with_means_metrics_and_provenance(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run(config)
    fingerprint = load_run(config.run_folder).info.fingerprint
    evaluation = {"model": {"fingerprint": fingerprint}, "results": {"zero_shot/t": {"top1": 0.5}}}
    (config.run_folder / "evaluation.json").write_text(json.dumps(evaluation))
    info = export_run(config.run_folder, tmp_path / "bundle", console=quiet())
    assert info.metrics == {"zero_shot/t": {"top1": 0.5}}
    assert info.provenance["samples_seen"] == 144
    assert info.provenance["config"]["optim"]["type"] == "lion"
    assert info.modality_means is not None
    assert info.modality_means.num_pairs == 64
    encoder = Encoder(load_bundle(tmp_path / "bundle"))
    data = embed_shards(encoder, tmp_path / "shards")
    evaluation["model"] = {"fingerprint": info.fingerprint}  # of the bundle, which has means
    (config.run_folder / "evaluation.json").write_text(json.dumps(evaluation))
    assert export_run(config.run_folder, tmp_path / "bundle", console=quiet()) == info
    assert info.modality_means.text == pytest.approx(data.texts.mean(0).tolist(), abs=1e-6)


def test_metrics_of_other_weights_are_left_out(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run(config)
    (config.run_folder / "evaluation.json").write_text('{"model": {"fingerprint": "0"}}')
    assert export_run(config.run_folder, tmp_path / "b", console=quiet()).metrics == {}


def test_an_export_of_a_run_that_is_not_at_its_end_says_so(tmp_path: Path) -> None:
    config = configured(tmp_path)
    step = run(config)
    said = {}
    for name, total in (("done", step), ("half", 2000)):
        settings = config.model_copy(update={"steps": total}).model_dump(mode="json")
        (config.run_folder / "config.yaml").write_text(yaml.safe_dump(settings))
        console = Console(file=io.StringIO(), width=200)
        export_run(config.run_folder, tmp_path / name, console=console)
        said[name] = console.file.getvalue()  # type: ignore[attr-defined] # the StringIO of above
    assert f"step {step} of 2,000: this is the model so far" in said["half"]
    assert "so far" not in said["done"]


def test_the_average_of_weights_is_what_is_exported(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run(config)
    exported = load_run(config.run_folder).model.state_dict()
    average = final_weights(config, "ema")
    assert all(torch.equal(exported[key], average[key]) for key in average)


def test_a_folder_without_checkpoint_says_to_train(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here; train it first"):
        load_run(tmp_path)
