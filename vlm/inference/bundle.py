"""A bundle: the immutable folder in which a trained model leaves training.

    model.safetensors             weights, of a dual encoder under open_clip's names
    open_clip_config.json         of a dual encoder: model_cfg and preprocess_cfg, so that plain
                                  open_clip opens the folder
    coca_config.json              of a CoCa instead: its own configuration. open_clip cannot open
                                  such a bundle, since its CoCa is another model
    config.json                   of a text tower of transformers: its architecture
    tokenizer_config.vlm.json     which tokenizer, and its context length
    bpe_simple_vocab_16e6.txt.gz  the merges of the byte-pair tokenizer, or
    tokenizer.json, tokenizer_config.json  those of a tokenizer of transformers
    bundle.json                   kind of model, fingerprint, SHA-256 of the other files, modality
                                  means, logit scale and bias, provenance, metrics

The fingerprint is a hash of everything that decides an embedding, a score or a probability: of
bundle.json without name, provenance and metrics, and through it of the other files. Embeddings of
equal fingerprints may be compared, others never. Nothing in a bundle is unpickled.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm.config import Config, validate_config
from vlm.errors import BundleError, ConfigError
from vlm.files import file_sha256
from vlm.models import CoCa, CocaConfig, DualEncoder, Model
from vlm.preprocess import (
    AnyTokenizerConfig,
    HuggingFaceTokenizerConfig,
    ImageConfig,
    TokenizerConfig,
    save_tokenizer,
    tokenizer_files,
)

__all__ = [
    "Bundle",
    "BundleInfo",
    "ModalityMeans",
    "bundle_files",
    "bundle_fingerprint",
    "load_bundle",
    "read_bundle_info",
    "save_bundle",
    "verify_bundle",
]

FORMAT_VERSION: Final = 2
_WEIGHTS: Final = "model.safetensors"
_OPEN_CLIP: Final = "open_clip_config.json"
_COCA: Final = "coca_config.json"
_TOKENIZER: Final = "tokenizer_config.vlm.json"
_TEXT_TOWER: Final = "config.json"
_BUNDLE: Final = "bundle.json"
_UNDECISIVE: Final = frozenset({"fingerprint", "name", "provenance", "metrics"})
"""Fields that no embedding, score or probability depends on."""
_MISFITS: Final = (ConfigError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


class ModalityMeans(Config):
    """Mean unit embedding of each modality over a reference set, for centring at query time."""

    image: list[float]
    text: list[float]
    num_pairs: int = Field(ge=1)


class BundleInfo(Config):
    """The content of `bundle.json`."""

    format_version: int
    name: str
    model_kind: Literal["dual_encoder", "coca"] = "dual_encoder"
    """Which of the two configuration files is there, and what the weights are named after."""
    text_tower_file: bool = False
    """Whether `config.json`, the text tower of transformers, is one of its files."""
    fingerprint: str
    """64 hex digits."""
    files: dict[str, str]
    """SHA-256, in hex, of the other files."""
    dim: int
    logit_scale: float
    logit_bias: float | None = None
    modality_means: ModalityMeans | None = None
    image: ImageConfig
    tokenizer: AnyTokenizerConfig
    """In the file, its source is `.`: the bundle itself."""
    provenance: dict[str, Any] = {}
    """How it was trained: resolved config, steps, samples seen, data."""
    metrics: dict[str, Any] = {}
    """The evaluation it left training with."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A loaded bundle: the model in evaluation mode, and what is known about it."""

    info: BundleInfo
    model: Model


def save_bundle(
    folder: Path,
    model: Model,
    *,
    name: str,
    open_clip_config: dict[str, Any] | None = None,
    image: ImageConfig,
    tokenizer: TokenizerConfig | HuggingFaceTokenizerConfig,
    modality_means: ModalityMeans | None = None,
    provenance: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> BundleInfo:
    """Write a bundle; the folder appears whole or not at all, and replaces an older bundle.

    `open_clip_config` is the `model_cfg` of a dual encoder; a CoCa knows its own.

    Raises:
        BundleError: If `folder` exists and is not a bundle, which is never overwritten, or a
            number that decides is not finite.
    """
    if folder.exists() and not (folder / _BUNDLE).is_file():
        message = f"{folder}: exists and is not a bundle; choose another folder or remove it"
        raise BundleError(message)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        dim = _write_model(draft, model, open_clip_config, image)
        saved = save_tokenizer(tokenizer, draft)
        _write_json(draft / _TOKENIZER, saved.model_dump(mode="json"))
        has_text_tower_file = (draft / _TEXT_TOWER).is_file()
        hashed = _hashed_files(_kind(model), saved, has_text_tower_file=has_text_tower_file)
        info = BundleInfo(
            format_version=FORMAT_VERSION,
            name=name,
            model_kind=_kind(model),
            text_tower_file=has_text_tower_file,
            fingerprint="",
            files={name: file_sha256(draft / name) for name in hashed},
            dim=dim,
            logit_scale=float(model.logit_scale().item()),
            logit_bias=None if model.logit_bias is None else float(model.logit_bias.item()),
            modality_means=modality_means,
            image=image,
            tokenizer=saved,
            provenance=provenance or {},
            metrics=metrics or {},
        )
        tree = info.model_dump(mode="json")
        _require_finite(tree, folder)
        info = info.model_copy(update={"fingerprint": bundle_fingerprint(tree)})
        _write_json(draft / _BUNDLE, {**tree, "fingerprint": info.fingerprint})
        draft.chmod(0o755)
        _swap(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return _located(info, folder)


def read_bundle_info(folder: Path) -> BundleInfo:
    """Read `bundle.json` alone, without the weights, and check it against the fingerprint.

    Raises:
        BundleError: If the folder holds no bundle, or one of another format version, or its
            description was altered since export.
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
        message = (
            f"{path}: format version {found!r}, this program reads {FORMAT_VERSION}; "
            f"export the bundle again"
        )
        raise BundleError(message)
    try:
        info = validate_config(BundleInfo, tree, source=str(path))
    except ConfigError as error:
        raise BundleError(str(error)) from error
    _require_finite(tree, path)
    if (real := bundle_fingerprint(tree)) != info.fingerprint:
        message = (
            f"{path}: altered since export. {_BUNDLE} promises fingerprint "
            f"{info.fingerprint[:12]}, its content has {real[:12]}; copy the bundle or export it "
            f"again"
        )
        raise BundleError(message)
    return _located(info, folder)


def bundle_fingerprint(tree: Mapping[str, Any]) -> str:
    """The fingerprint of a bundle whose `bundle.json` has this content: 64 hex digits."""
    decisive = _decisive(tree)
    # Where a tokenizer was found is no part of it: in a bundle it is the bundle itself.
    decisive["tokenizer"] = {k: v for k, v in tree["tokenizer"].items() if k != "source"}
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _decisive(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in _UNDECISIVE}


def _require_finite(tree: Mapping[str, Any], where: Path) -> None:
    """JSON has no NaN, but Python reads and writes it, and answers would be made of it."""
    for name, value in _decisive(tree).items():
        if (found := _not_finite(value)) is not None:
            message = (
                f"{where}: {name} holds {found}, only finite numbers are allowed; "
                f"export a model that has not diverged"
            )
            raise BundleError(message)


def _not_finite(value: Any) -> float | None:
    """The first number in there that is not finite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for part in parts if (found := _not_finite(part)) is not None), None)


def _located(info: BundleInfo, folder: Path) -> BundleInfo:
    """The same, with a tokenizer that is found from anywhere."""
    if isinstance(info.tokenizer, TokenizerConfig):
        return info
    tokenizer = info.tokenizer.model_copy(update={"source": str(folder.resolve())})
    return info.model_copy(update={"tokenizer": tokenizer})


def bundle_files(info: BundleInfo) -> tuple[str, ...]:
    """Names of all files of a bundle; its description comes last."""
    names = _hashed_files(info.model_kind, info.tokenizer, has_text_tower_file=info.text_tower_file)
    return (*names, _BUNDLE)


def verify_bundle(folder: Path) -> BundleInfo:
    """Check that the files are those that the fingerprint was taken of, without loading them.

    Raises:
        BundleError: If files are missing or were altered since export.
    """
    info = read_bundle_info(folder)
    for name in bundle_files(info)[:-1]:
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            message = f"{folder}: incomplete, cannot read {name} ({error.strerror})"
            raise BundleError(message) from error
        if found != info.files.get(name):
            message = (
                f"{folder}: altered since export. {name} is not what was written; copy the bundle "
                f"or export it again"
            )
            raise BundleError(message)
    return info


def load_bundle(folder: Path) -> Bundle:
    """Load a bundle and verify its fingerprint.

    Raises:
        BundleError: If files are missing, damaged, altered since export, or do not fit together.
    """
    info = verify_bundle(folder)
    try:
        model = _read_model(folder, info.model_kind)
    except _MISFITS as error:
        message = f"{folder}: the files do not make a model ({error})"
        raise BundleError(message) from error
    return Bundle(info=info, model=model.eval())


def _kind(model: Model) -> Literal["dual_encoder", "coca"]:
    return "coca" if isinstance(model, CoCa) else "dual_encoder"


def _write_model(
    folder: Path, model: Model, open_clip_config: dict[str, Any] | None, image: ImageConfig
) -> int:
    """Write weights and configuration; returns the width of the embeddings."""
    if isinstance(model, CoCa):
        state, file, tree = model.state_dict(), _COCA, model.architecture
        dim = tree["config"]["dim"]
    else:
        if open_clip_config is None:
            message = "the bundle of a dual encoder needs its open_clip_config"
            raise ValueError(message)
        state, file = model.open_clip_state(), _OPEN_CLIP
        config = _write_text_tower(folder, model, open_clip_config)
        tree = {"model_cfg": config, "preprocess_cfg": image.model_dump(mode="json")}
        dim = config["embed_dim"]
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(plain, folder / _WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / file, tree)
    return int(dim)


def _write_text_tower(
    folder: Path, model: DualEncoder, open_clip_config: dict[str, Any]
) -> dict[str, Any]:
    """Write the configuration of a text tower of transformers, and return what names it.

    A name on the hub stays, so that open_clip opens the bundle from anywhere; a folder of this
    machine becomes the bundle itself.
    """
    text = dict(open_clip_config["text_cfg"])
    if "hf_model_name" not in text:
        return open_clip_config
    model.text.config.save_pretrained(folder)  # type: ignore[union-attr, operator] # of transformers
    if Path(text["hf_model_name"]).is_dir():
        text["hf_model_name"] = "."
    text["hf_tokenizer_name"] = text["hf_model_name"]
    return {**open_clip_config, "text_cfg": text}


def _read_model(folder: Path, kind: Literal["dual_encoder", "coca"]) -> Model:
    if kind == "coca":
        tree = json.loads((folder / _COCA).read_text(encoding="utf-8"))
        config = validate_config(CocaConfig, tree["config"], source=str(folder / _COCA))
        coca = CoCa(config, image_size=tree["image_size"], context_length=tree["context_length"])
        coca.load_state_dict(load_file(folder / _WEIGHTS))
        return coca
    tree = json.loads((folder / _OPEN_CLIP).read_text(encoding="utf-8"))["model_cfg"]
    if "hf_model_name" in tree["text_cfg"]:
        tree["text_cfg"]["hf_model_name"] = str(folder)
    model = DualEncoder(tree)
    model.load_open_clip_state(load_file(folder / _WEIGHTS))
    return model


def _hashed_files(
    kind: Literal["dual_encoder", "coca"],
    tokenizer: TokenizerConfig | HuggingFaceTokenizerConfig,
    *,
    has_text_tower_file: bool,
) -> tuple[str, ...]:
    names = [_WEIGHTS, _COCA if kind == "coca" else _OPEN_CLIP, _TOKENIZER]
    names += tokenizer_files(tokenizer)
    return (*names, _TEXT_TOWER) if has_text_tower_file else tuple(names)


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
