"""Models of open_clip as bundles, so that everything that takes a bundle takes them too.

    local-dir:FOLDER            a folder as open_clip writes one: open_clip_config.json and weights
    open_clip:ARCH/TAG          one of open_clip's pretrained models; needs its model hub
    hf-hub:ORGANISATION/NAME    a checkpoint of open_clip on the hub

Where they are and how they are read is `vlm.models.checkpoints`' matter. What is made is a bundle
like any other, with a fingerprint. Weights are read from safetensors alone: other formats would
have to be unpickled.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError

from vlm.errors import BundleError, ConfigError
from vlm.files import file_sha256
from vlm.inference.bundle import BundleInfo, read_bundle_info, save_bundle
from vlm.models import DualEncoder
from vlm.models.checkpoints import Checkpoint, find_checkpoint
from vlm.preprocess import ImageConfig, TokenizerConfig

__all__ = ["import_open_clip", "is_open_clip_source", "open_clip_name"]

_LOCAL: Final = "local-dir:"
_HUB: Final = "open_clip:"
_ANY_HUB: Final = "hf-hub:"
_MISFITS: Final = (ConfigError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


def is_open_clip_source(text: str) -> bool:
    """Whether this names a model of open_clip, and not a folder."""
    return text.startswith((_LOCAL, _HUB, _ANY_HUB))


def open_clip_name(source: str) -> str:
    """What the bundle of a source is called, e.g. `ViT-B-32-laion2b_s34b_b79k`."""
    if source.startswith(_LOCAL):
        return Path(source.removeprefix(_LOCAL)).resolve().name
    return source.removeprefix(_HUB).removeprefix(_ANY_HUB).replace("/", "-")


def import_open_clip(source: str, folder: Path) -> BundleInfo:
    """Write the bundle of an open_clip model, or leave it where it was written before.

    Args:
        source: `local-dir:FOLDER`, `open_clip:ARCH/TAG` or `hf-hub:ORGANISATION/NAME`.
        folder: Of the bundle; whole or absent.

    Raises:
        BundleError: If the source is not there, cannot be fetched, has no safetensors, or is a
            model that bundles cannot hold (another tokenizer than CLIP's, or open_clip's CoCa).
    """
    try:
        checkpoint = find_checkpoint(source.removeprefix(_HUB))
        weights = checkpoint.weights_file()
    except ConfigError as error:
        raise BundleError(str(error)) from error
    if weights.suffix != ".safetensors":
        message = (
            f"{source}: its weights, {weights.name}, would be unpickled; choose another tag, or "
            f"save them with safetensors"
        )
        raise BundleError(message)
    name = open_clip_name(source)
    config = {"model_cfg": checkpoint.model_config, "preprocess_cfg": checkpoint.preprocessing}
    provenance = {"open_clip": name, "weights_sha256": file_sha256(weights), "config": config}
    if (folder / "bundle.json").is_file():
        with suppress(BundleError):  # of an older format, or altered: it is made again
            known = read_bundle_info(folder)
            if known.provenance == provenance:
                return known
    _refuse_unknown_parts(source, checkpoint.model_config)
    try:
        return _convert(folder, checkpoint, provenance)
    except _MISFITS as error:
        message = f"{source}: the files do not make a model ({error})"
        raise BundleError(message) from error


def _refuse_unknown_parts(source: str, model: dict[str, Any]) -> None:
    foreign = sorted(
        {"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"} & set(model["text_cfg"])
    )
    if foreign:
        message = (
            f"{source}: text_cfg.{foreign[0]} asks for a tokenizer or model that bundles do not "
            f"hold; they hold dual encoders with CLIP's byte-pair tokenizer"
        )
        raise BundleError(message)


def _convert(folder: Path, checkpoint: Checkpoint, provenance: dict[str, Any]) -> BundleInfo:
    architecture = {**checkpoint.model_config, "custom_text": True}
    model = DualEncoder(architecture)
    model.load_open_clip_state(checkpoint.read_weights())
    known = set(ImageConfig.model_fields)
    preprocess = {k: v for k, v in checkpoint.preprocessing.items() if k in known}
    size = architecture["vision_cfg"].get("image_size", 224)
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
