"""From a run folder to a bundle."""

import json
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

import vlm
from vlm.config import load_config
from vlm.errors import CheckpointError
from vlm.evaluation import modality_means
from vlm.inference import (
    Bundle,
    BundleInfo,
    Encoder,
    ModalityMeans,
    bundle_fingerprint,
    load_bundle,
    save_bundle,
)
from vlm.train.checkpoint import Checkpoint, latest_checkpoint, load_weights
from vlm.train.config import TrainConfig
from vlm.train.places import FolderPlace, checkpoint_place
from vlm.train.setup import build_model, open_clip_config

__all__ = ["export_run", "load_run"]

_MEANS_PAIRS = 2000


def load_run(run: Path) -> Bundle:
    """The model of a run's newest checkpoint, as a bundle in memory.

    It has no modality means, so its fingerprint is not that of the bundle which `export_run` would
    write, though their embeddings are equal.

    Raises:
        CheckpointError: If the run has no checkpoint, or a damaged one.
    """
    config, checkpoint = _open_run(run)
    with tempfile.TemporaryDirectory() as folder:
        _save(Path(folder) / "bundle", config, checkpoint, means=None, metrics={})
        bundle = load_bundle(Path(folder) / "bundle")
    # The folder is gone, and with it a tokenizer that lay there.
    info = bundle.info.model_copy(update={"tokenizer": config.tokenizer})
    return replace(bundle, info=info)


def export_run(run: Path, folder: Path, *, console: Console) -> BundleInfo:
    """Write the bundle of a run's newest checkpoint, with modality means and metrics.

    The means are those of up to 2,000 training pairs. Metrics come from `evaluation.json` in the
    run folder, if it was made of this run at this step, or of this bundle.

    Raises:
        BundleError: If `folder` exists and is not a bundle.
        CheckpointError: If the run has no checkpoint, or a damaged one.
        DataError: If the training data are gone, which the means need.
    """
    config, checkpoint = _open_run(run)
    # Epochs are of so many steps as the data have, which need not be there any more.
    if config.epochs is None and checkpoint.step < (total := config.total_steps(0)):
        done = f"the run is at step {checkpoint.step:,} of {total:,}: this is the model so far"
        console.print(done, highlight=False)
    bundle = load_run(run)
    console.print(f"modality means over up to {_MEANS_PAIRS} training pairs", highlight=False)
    locations = [source.shards for source in config.data.all_sources]
    means = modality_means(Encoder(bundle), locations, max_pairs=_MEANS_PAIRS)
    described = bundle.info.model_copy(update={"modality_means": means}).model_dump(mode="json")
    alike = {bundle.info.fingerprint, bundle_fingerprint(described)}
    metrics = _metrics(run / "evaluation.json", alike, console)
    return _save(folder, config, checkpoint, means=means, metrics=metrics)


def _open_run(run: Path) -> tuple[TrainConfig, Checkpoint]:
    path = run / "config.yaml"
    if not path.is_file():
        raise _untrained(run)
    config = load_config(TrainConfig, path, [])
    # The folder may have been moved since; a store has not.
    place = FolderPlace(run / "checkpoints") if config.checkpoints is None else None
    checkpoint = latest_checkpoint(place or checkpoint_place(config))
    if checkpoint is None:
        raise _untrained(run)
    return config, checkpoint


def _untrained(run: Path) -> CheckpointError:
    return CheckpointError(f"{run}: no checkpoint here; train it first: vlm train CONFIG")


def _save(
    folder: Path,
    config: TrainConfig,
    checkpoint: Checkpoint,
    *,
    means: ModalityMeans | None,
    metrics: dict[str, Any],
) -> BundleInfo:
    model = build_model(config, initial_weights=False)
    weights = load_weights(checkpoint, ema=True) or load_weights(checkpoint, ema=False)
    assert weights is not None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        message = f"{checkpoint.folder}: weights do not fit the run's config.yaml ({error})"
        raise CheckpointError(message) from error
    return save_bundle(
        folder,
        model,
        name=config.name,
        open_clip_config=open_clip_config(config),
        image=config.image,
        tokenizer=config.tokenizer,
        modality_means=means,
        provenance={
            "vlm": vlm.__version__,
            "step": checkpoint.step,
            "samples_seen": checkpoint.step * config.global_batch,
            "data_fingerprint": checkpoint.facts["data_fingerprint"],
            "config": config.model_dump(mode="json"),
        },
        metrics=metrics,
    )


def _metrics(path: Path, alike: Collection[str], console: Console) -> dict[str, Any]:
    if not path.is_file():
        return {}
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if tree.get("model", {}).get("fingerprint") not in alike:
        console.print(f"{path} is of other weights and is left out; run vlm evaluate again")
        return {}
    results: dict[str, Any] = tree.get("results", {})
    return results
