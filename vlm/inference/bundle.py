"""A bundle: the immutable folder in which a trained model leaves training.

    model.safetensors             weights under open_clip's names
    open_clip_config.json         model_cfg and preprocess_cfg: plain open_clip opens the folder
    tokenizer_config.vlm.json     which tokenizer, and its context length
    bpe_simple_vocab_16e6.txt.gz  the merges of the byte-pair tokenizer
    bundle.json                   fingerprint, modality means, logit scale and bias, provenance,
                                  metrics

The fingerprint is a hash of everything that decides an embedding: weights, architecture,
preprocessing and tokenizer. Embeddings of equal fingerprints may be compared, others never.
Nothing in a bundle is unpickled.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm.config import Config, validate_config
from vlm.errors import BundleError, ConfigError
from vlm.models.dual_encoder import DualEncoder
from vlm.preprocess import ImageConfig, TokenizerConfig, tokenizer_vocabulary

__all__ = [
    "Bundle",
    "BundleInfo",
    "ModalityMeans",
    "load_bundle",
    "read_bundle_info",
    "save_bundle",
]

FORMAT_VERSION: Final = 1
_WEIGHTS: Final = "model.safetensors"
_OPEN_CLIP: Final = "open_clip_config.json"
_TOKENIZER: Final = "tokenizer_config.vlm.json"
_VOCABULARY: Final = "bpe_simple_vocab_16e6.txt.gz"
_BUNDLE: Final = "bundle.json"


class ModalityMeans(Config):
    """Mean unit embedding of each modality over a reference set, for centring at query time."""

    image: list[float]
    text: list[float]
    num_pairs: int = Field(ge=1)


class BundleInfo(Config):
    """The content of `bundle.json`."""

    format_version: int
    name: str
    fingerprint: str
    """64 hex digits."""
    dim: int
    logit_scale: float
    logit_bias: float | None = None
    modality_means: ModalityMeans | None = None
    image: ImageConfig
    tokenizer: TokenizerConfig
    provenance: dict[str, Any] = {}
    """How it was trained: resolved config, steps, samples seen, data."""
    metrics: dict[str, Any] = {}
    """The evaluation it left training with."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A loaded bundle: the model in evaluation mode, and what is known about it."""

    info: BundleInfo
    model: DualEncoder


def save_bundle(
    folder: Path,
    model: DualEncoder,
    *,
    name: str,
    open_clip_config: dict[str, Any],
    image: ImageConfig,
    tokenizer: TokenizerConfig,
    modality_means: ModalityMeans | None = None,
    provenance: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> BundleInfo:
    """Write a bundle; the folder appears whole or not at all, and replaces an older bundle.

    Raises:
        BundleError: If `folder` exists and is not a bundle, which is never overwritten.
    """
    if folder.exists() and not (folder / _BUNDLE).is_file():
        message = f"{folder}: exists and is not a bundle; choose another folder or remove it"
        raise BundleError(message)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        state = {k: v.detach().cpu().contiguous() for k, v in model.open_clip_state().items()}
        save_file(state, draft / _WEIGHTS, metadata={"format": "pt"})
        _write_json(draft / _OPEN_CLIP, _open_clip_file(open_clip_config, image))
        _write_json(draft / _TOKENIZER, tokenizer.model_dump(mode="json"))
        shutil.copyfile(tokenizer_vocabulary(tokenizer), draft / _VOCABULARY)
        info = BundleInfo(
            format_version=FORMAT_VERSION,
            name=name,
            fingerprint=_fingerprint(draft),
            dim=int(open_clip_config["embed_dim"]),
            logit_scale=float(model.logit_scale().item()),
            logit_bias=None if model.logit_bias is None else float(model.logit_bias.item()),
            modality_means=modality_means,
            image=image,
            tokenizer=tokenizer,
            provenance=provenance or {},
            metrics=metrics or {},
        )
        _write_json(draft / _BUNDLE, info.model_dump(mode="json"))
        draft.chmod(0o755)
        _swap(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return info


def read_bundle_info(folder: Path) -> BundleInfo:
    """Read `bundle.json` alone, without the weights.

    Raises:
        BundleError: If the folder holds no bundle, or one of another format version.
    """
    path = folder / _BUNDLE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"{folder}: not a bundle, {_BUNDLE} cannot be read ({error.strerror})"
        raise BundleError(message) from error
    except ValueError as error:
        message = f"{path}: damaged, not valid JSON ({error}); export the run again"
        raise BundleError(message) from error
    found = tree.get("format_version") if isinstance(tree, dict) else None
    if found != FORMAT_VERSION:
        message = f"{path}: format version {found!r}, this program reads {FORMAT_VERSION}"
        raise BundleError(message)
    try:
        return validate_config(BundleInfo, tree, source=str(path))
    except ConfigError as error:
        raise BundleError(str(error)) from error


def load_bundle(folder: Path) -> Bundle:
    """Load a bundle and verify its fingerprint.

    Raises:
        BundleError: If files are missing, damaged, altered since export, or do not fit together.
    """
    info = read_bundle_info(folder)
    try:
        found = _fingerprint(folder)
        if found != info.fingerprint:
            message = (
                f"{folder}: altered since export. {_BUNDLE} promises fingerprint "
                f"{info.fingerprint[:12]}, the files have {found[:12]}; copy the bundle again"
            )
            raise BundleError(message)
        config = json.loads((folder / _OPEN_CLIP).read_text(encoding="utf-8"))["model_cfg"]
        model = DualEncoder(_without_downloads(config))
        model.load_open_clip_state(load_file(folder / _WEIGHTS))
    except OSError as error:
        message = f"{folder}: incomplete, cannot read {error.filename} ({error.strerror})"
        raise BundleError(message) from error
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        message = f"{folder}: the files do not make a model ({error})"
        raise BundleError(message) from error
    return Bundle(info=info, model=model.eval())


def _open_clip_file(config: dict[str, Any], image: ImageConfig) -> dict[str, Any]:
    preprocess = image.model_dump(mode="json")
    return {"model_cfg": _without_downloads(config), "preprocess_cfg": preprocess}


def _without_downloads(config: dict[str, Any]) -> dict[str, Any]:
    """The same architecture, but never fetching the weights it once started from."""
    vision = dict(config["vision_cfg"])
    if "timm_model_pretrained" in vision:
        vision["timm_model_pretrained"] = False
    return {**config, "vision_cfg": vision}


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (_WEIGHTS, _OPEN_CLIP, _TOKENIZER, _VOCABULARY):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(draft: Path, folder: Path) -> None:
    """Put `draft` under its final name; an older bundle is moved away first, then removed."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        folder.replace(old / "bundle")
        draft.replace(folder)
        shutil.rmtree(old)
    else:
        draft.replace(folder)
