"""Models made of trained models: what they start from, and the bundle they become."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlm
from vlm.config import load_config
from vlm.errors import BundleError, CheckpointError
from vlm.evaluation import modality_means
from vlm.inference import Bundle, BundleInfo, Encoder, load_bundle, save_bundle
from vlm.models import DualEncoder, Model
from vlm.train.checkpoint import Checkpoint, load_weights
from vlm.train.config import TrainConfig
from vlm.train.export import load_run
from vlm.train.setup import open_clip_config

__all__ = ["Origin", "load_origin", "require_dual_encoder", "require_free", "save_derived"]

_MEANS_PAIRS = 2000
_OPEN_CLIP = "open_clip_config.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A trained model, and how open_clip spells it."""

    path: Path
    bundle: Bundle
    model_cfg: dict[str, Any] | None
    """open_clip's, of a dual encoder."""


def load_origin(path: Path) -> Origin:
    """The model of a bundle, of a run, or of one checkpoint in a run's folder.

    Raises:
        BundleError: If `path` is none of them, or a damaged bundle.
        CheckpointError: If the run has no checkpoint, or a damaged one.
    """
    if (path / "bundle.json").is_file():
        return Origin(path=path, bundle=load_bundle(path), model_cfg=_model_cfg(path))
    if (path / "config.yaml").is_file():
        return _of_run(path, path, load_run(path))
    run = path.parent.parent
    if (path / "checkpoint.json").is_file() and (run / "config.yaml").is_file():
        return _of_run(path, run, _at_checkpoint(load_run(run), path))
    message = (
        f"{path}: neither a bundle (bundle.json), nor a run (config.yaml), nor a checkpoint of a "
        f"run (RUN/checkpoints/step-…)"
    )
    raise BundleError(message)


def save_derived(
    folder: Path,
    model: Model,
    origin: Origin,
    *,
    name: str,
    provenance: dict[str, Any],
    shards: list[Path],
) -> BundleInfo:
    """Write a bundle of new weights with the preprocessing and tokenizer of `origin`.

    Its modality means are those of up to 2,000 pairs of `shards`; it has none without.

    Raises:
        BundleError: If `folder` exists and is not a bundle.
        DataError: If the shards cannot be read.
    """
    info = origin.bundle.info
    model.eval()
    means = None
    if shards:
        encoder = Encoder(Bundle(info=info, model=model))
        means = modality_means(encoder, shards, max_pairs=_MEANS_PAIRS)
    return save_bundle(
        folder,
        model,
        name=name,
        open_clip_config=origin.model_cfg,
        image=info.image,
        tokenizer=info.tokenizer,
        modality_means=means,
        provenance={"vlm": vlm.__version__, **provenance},
    )


def _of_run(path: Path, run: Path, bundle: Bundle) -> Origin:
    config = load_config(TrainConfig, run / "config.yaml", [])
    return Origin(path=path, bundle=bundle, model_cfg=open_clip_config(config))


def _at_checkpoint(bundle: Bundle, folder: Path) -> Bundle:
    """The same model with the weights of another checkpoint."""
    checkpoint = Checkpoint(folder=folder, step=0, facts={}, numbers={})
    weights = load_weights(checkpoint, ema=True) or load_weights(checkpoint, ema=False)
    assert weights is not None
    try:
        bundle.model.load_state_dict(weights)
    except RuntimeError as error:
        message = f"{folder}: weights do not fit the run's config.yaml ({error})"
        raise CheckpointError(message) from error
    return bundle


def _model_cfg(folder: Path) -> dict[str, Any] | None:
    path = folder / _OPEN_CLIP
    if not path.is_file():
        return None
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
    return tree


def require_free(folder: Path) -> None:
    """Refuse, before the work and not after it, a place where no bundle can be written.

    Raises:
        BundleError: If `folder` exists and is not a bundle.
    """
    if folder.exists() and not (folder / "bundle.json").is_file():
        message = f"{folder}: exists and is not a bundle; choose another folder or remove it"
        raise BundleError(message)


def require_dual_encoder(origin: Origin) -> DualEncoder:
    """The model, if it is one that both tools know.

    Raises:
        BundleError: If it is another.
    """
    model = origin.bundle.model
    if not isinstance(model, DualEncoder):
        message = f"{origin.path}: only a dual encoder can be refined, this is a coca"
        raise BundleError(message)
    return model
