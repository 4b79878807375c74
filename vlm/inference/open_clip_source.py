"""Models of open_clip as bundles, so that everything that takes a bundle takes them too.

    local-dir:FOLDER            a folder as open_clip writes one: open_clip_config.json and weights
    open_clip:ARCH/TAG          one of open_clip's pretrained models; needs its model hub

What is made is a bundle like any other, with a fingerprint. Weights are read from safetensors
alone: other formats would have to be unpickled.
"""

import json
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file

from vlm.errors import BundleError, ConfigError
from vlm.files import file_sha256
from vlm.inference.bundle import BundleInfo, read_bundle_info, save_bundle
from vlm.models import DualEncoder
from vlm.preprocess import ImageConfig, TokenizerConfig

__all__ = ["import_open_clip", "is_open_clip_source", "open_clip_name"]

_LOCAL: Final = "local-dir:"
_HUB: Final = "open_clip:"
_CONFIG: Final = "open_clip_config.json"
_WEIGHTS: Final = ("open_clip_model.safetensors", "model.safetensors")
_MISFITS: Final = (ConfigError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


def is_open_clip_source(text: str) -> bool:
    """Whether this names a model of open_clip, and not a folder."""
    return text.startswith((_LOCAL, _HUB))


def open_clip_name(source: str) -> str:
    """What the bundle of a source is called, e.g. `ViT-B-32-laion2b_s34b_b79k`."""
    if source.startswith(_HUB):
        return source.removeprefix(_HUB).replace("/", "-")
    return Path(source.removeprefix(_LOCAL)).resolve().name


def import_open_clip(source: str, folder: Path) -> BundleInfo:
    """Write the bundle of an open_clip model, or leave it where it was written before.

    Args:
        source: `local-dir:FOLDER` or `open_clip:ARCH/TAG`.
        folder: Of the bundle; whole or absent.

    Raises:
        BundleError: If the source is not there, cannot be fetched, has no safetensors, or is a
            model that bundles cannot hold (another tokenizer than CLIP's, or open_clip's CoCa).
    """
    if source.startswith(_HUB):
        config, weights = _from_hub(source.removeprefix(_HUB))
    else:
        config, weights = _from_folder(Path(source.removeprefix(_LOCAL)))
    digest = file_sha256(weights)
    provenance = {"open_clip": open_clip_name(source), "weights_sha256": digest, "config": config}
    if (folder / "bundle.json").is_file():
        known = read_bundle_info(folder)
        if known.provenance == provenance:
            return known
    _refuse_unknown_parts(source, config["model_cfg"])
    try:
        return _convert(folder, config, weights, provenance)
    except _MISFITS as error:
        message = f"{source}: the files do not make a model ({error})"
        raise BundleError(message) from error


def _from_folder(folder: Path) -> tuple[dict[str, Any], Path]:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        message = f"{_LOCAL}{folder}: {_CONFIG} cannot be read ({error.strerror})"
        raise BundleError(message) from error
    except ValueError as error:
        message = f"{folder / _CONFIG}: not valid JSON ({error})"
        raise BundleError(message) from error
    if not isinstance(config, dict) or "model_cfg" not in config:
        message = f"{folder / _CONFIG}: no model_cfg; open_clip writes one beside preprocess_cfg"
        raise BundleError(message)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return config, folder / name
    there = ", ".join(sorted(path.name for path in folder.iterdir()))
    message = (
        f"{_LOCAL}{folder}: no {' or '.join(_WEIGHTS)} among {there}. Weights in other formats "
        f"are not opened, since they would be unpickled; save them with safetensors"
    )
    raise BundleError(message)


def _from_hub(name: str) -> tuple[dict[str, Any], Path]:
    from open_clip import get_model_config, get_pretrained_cfg  # noqa: PLC0415 - seconds
    from open_clip.pretrained import (  # noqa: PLC0415 - with it
        download_pretrained,
        list_pretrained_tags_by_model,
    )

    architecture, _, tag = name.partition("/")
    model = get_model_config(architecture)
    known = get_pretrained_cfg(architecture, tag)
    if not model or not known:
        tags = ", ".join(list_pretrained_tags_by_model(architecture)) or "none"
        message = (
            f"{_HUB}{name}: open_clip knows no such model; write ARCH/TAG, e.g. "
            f"open_clip:ViT-B-32/laion2b_s34b_b79k. Tags of {architecture!r}: {tags}"
        )
        raise BundleError(message)
    try:
        path = Path(download_pretrained(known))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        message = (
            f"{_HUB}{name}: the weights cannot be fetched ({reason}). Where no model hub can be "
            f"reached, bring a folder with {_CONFIG} and {_WEIGHTS[0]}: local-dir:FOLDER"
        )
        raise BundleError(message) from error
    if path.suffix != ".safetensors":
        message = f"{_HUB}{name}: its weights, {path.name}, would be unpickled; choose another tag"
        raise BundleError(message)
    return {
        "model_cfg": {**model, "quick_gelu": known.get("quick_gelu", False)},
        "preprocess_cfg": {k: known[k] for k in ("mean", "std", "interpolation", "resize_mode")},
    }, path


def _refuse_unknown_parts(source: str, model: dict[str, Any]) -> None:
    text = model.get("text_cfg", {})
    foreign = sorted({"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"} & set(text))
    if foreign or "multimodal_cfg" in model:
        what = f"text_cfg.{foreign[0]}" if foreign else "multimodal_cfg"
        message = (
            f"{source}: {what} asks for a tokenizer or model that bundles do not hold; they hold "
            f"dual encoders with CLIP's byte-pair tokenizer"
        )
        raise BundleError(message)


def _convert(
    folder: Path, config: dict[str, Any], weights: Path, provenance: dict[str, Any]
) -> BundleInfo:
    from open_clip.model import convert_to_custom_text_state_dict  # noqa: PLC0415 - seconds

    architecture = {**config["model_cfg"], "custom_text": True}
    vision = dict(architecture["vision_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False  # the weights come from the file
    architecture["vision_cfg"] = vision
    model = DualEncoder(architecture)
    model.load_open_clip_state(convert_to_custom_text_state_dict(load_file(weights)))
    known = set(ImageConfig.model_fields)
    preprocess = {k: v for k, v in config.get("preprocess_cfg", {}).items() if k in known}
    size = vision.get("image_size", 224)
    return save_bundle(
        folder,
        model.eval(),
        name=provenance["open_clip"],
        open_clip_config=architecture,
        image=ImageConfig.model_validate({**preprocess, "size": _side(size)}),
        tokenizer=TokenizerConfig(context_length=architecture["text_cfg"]["context_length"]),
        provenance=provenance,
    )


def _side(size: Any) -> int:
    if isinstance(size, int):
        return size
    first, second = size
    if first != second:
        message = f"image_size {size}: only square inputs are known"
        raise ValueError(message)
    return int(first)
