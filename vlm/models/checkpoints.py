"""Models that others have trained: where they are, how they are built, and their weights.

A name leads to one of

    ViT-B-32                    an architecture of open_clip, without weights
    ViT-B-32/laion2b_s34b_b79k  one of its checkpoints, from the model hub or its cache
    hf-hub:ORGANISATION/NAME    a checkpoint of open_clip on the hub
    local-dir:FOLDER, FOLDER    a folder with open_clip_config.json and weights, as open_clip and
                                `vlm export` write it

Nothing is unpickled: weights are safetensors, or what `torch.load` reads with `weights_only`.
"""

import copy
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlm.errors import ConfigError

__all__ = ["Checkpoint", "find_checkpoint", "read_weights", "timm_weights"]

_CONFIG = "open_clip_config.json"
_FILES = (  # in the order in which open_clip prefers them
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is known of a trained model before its weights are read."""

    name: str
    model_config: dict[str, Any]
    """open_clip's `model_cfg`, with nothing in it to download."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """open_clip's `preprocess_cfg`: mean, std, size, interpolation and resize_mode, where known."""
    weights: Path | partial[str] | None = None
    """A file, or what fetches one; none: an architecture alone."""

    def read_weights(self) -> dict[str, Tensor]:
        """The weights, under the names of open_clip's `CustomTextCLIP`, in float32.

        Raises:
            ConfigError: If there are none, or they cannot be had.
        """
        from open_clip.model import (  # noqa: PLC0415 - seconds, only builders pay
            convert_to_custom_text_state_dict,
        )

        state = read_weights(self.weights_file())
        state = convert_to_custom_text_state_dict(state)
        state.pop("text.transformer.embeddings.position_ids", None)  # of older transformers
        return {name: tensor.float() for name, tensor in state.items()}

    def weights_file(self) -> Path:
        """The file of the weights, fetched if it is not here yet.

        Raises:
            ConfigError: If there is none, or it cannot be had.
        """
        if self.weights is None:
            message = (
                f"{self.name}: no weights here; name a checkpoint, e.g. ViT-B-32/TAG, or a folder "
                f"with one of {', '.join(_FILES)}"
            )
            raise ConfigError(message)
        return _fetched(self.name, self.weights)


def find_checkpoint(name: str) -> Checkpoint:
    """The architecture that a name leads to, and where its weights are.

    Raises:
        ConfigError: If nothing is there, or it is no dual encoder.
    """
    if name.startswith("hf-hub:"):
        found = _on_hub(name)
    elif name.startswith("local-dir:") or Path(name).is_dir():
        found = _in_folder(name)
    else:
        found = _of_open_clip(name)
    if "multimodal_cfg" in found.model_config:
        message = (
            f"{name}: a CoCa of open_clip, whose poolers and masks are others than ours; "
            f"train a dual encoder, or start from a bundle of kind coca"
        )
        raise ConfigError(message)
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, without the wrappers that trainers put around them.

    Raises:
        ConfigError: If the file is missing, damaged, or holds more than tensors.
    """
    if path.suffix not in _SUFFIXES:
        message = f"{path}: weights are read from {', '.join(_SUFFIXES)} files, not {path.suffix!r}"
        raise ConfigError(message)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0]
        message = f"{path}: no weights that can be read safely ({reason}); use a .safetensors file"
        raise ConfigError(message) from error
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        message = f"{path}: expected named tensors, found other things; use a .safetensors file"
        raise ConfigError(message)
    return {str(name).removeprefix("module."): tensor for name, tensor in tree.items()}


def timm_weights(name: str, path: Path | None) -> dict[str, Tensor]:
    """Weights of a timm model without its classifier, from a file or else from its hub.

    Raises:
        ConfigError: If they cannot be had, or are another model's.
    """
    import timm  # noqa: PLC0415 - seconds, only builders pay

    if path is not None and not path.is_file():
        message = f"{path}: no such file; give timm weights of {name}"
        raise ConfigError(message)
    overlay: dict[str, Any] = (
        {} if path is None else {"pretrained_cfg_overlay": {"file": str(path)}}
    )
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, **overlay)
    except (OSError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as error:
        where = "timm's model hub" if path is None else str(path)
        message = f"timm {name}: no weights that fit from {where} ({_first_line(error)})"
        raise ConfigError(message) from error
    return model.state_dict()


def _in_folder(name: str) -> Checkpoint:
    folder = Path(name.removeprefix("local-dir:"))
    try:
        tree = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        model_config = tree["model_cfg"]
        text = model_config["text_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{folder}: no open_clip model, {_CONFIG} cannot be read ({_first_line(error)})"
        raise ConfigError(message) from error
    present = [folder / file for file in _FILES if (folder / file).is_file()]
    if text.get("hf_model_name") == ".":
        text["hf_model_name"] = str(folder)
    return Checkpoint(
        name=name,
        model_config=_without_downloads(model_config),
        preprocessing=tree.get("preprocess_cfg", {}),
        weights=present[0] if present else None,
    )


def _on_hub(name: str) -> Checkpoint:
    from open_clip import factory, pretrained  # noqa: PLC0415 - seconds, only builders pay

    model_id = name.removeprefix("hf-hub:")
    try:
        tree = factory._get_hf_config(model_id)
        model_config = tree["model_cfg"]
    except Exception as error:  # what a hub client raises has no common class
        message = f"{name}: not on a model hub that answers ({_first_line(error)})"
        raise ConfigError(message) from error
    return Checkpoint(
        name=name,
        model_config=_without_downloads(model_config),
        preprocessing=tree.get("preprocess_cfg", {}),
        weights=partial(pretrained.download_pretrained_from_hf, model_id),
    )


def _of_open_clip(name: str) -> Checkpoint:
    import open_clip  # noqa: PLC0415 - seconds, only builders pay

    architecture, _, tag = name.partition("/")
    model_config = open_clip.get_model_config(architecture)
    if model_config is None:
        message = (
            f"{name}: open_clip has no architecture {architecture!r} (`open_clip.list_models()`), "
            f"and there is no such folder"
        )
        raise ConfigError(message)
    if not tag:
        return Checkpoint(name=name, model_config=_without_downloads(model_config))
    facts = open_clip.get_pretrained_cfg(architecture, tag)
    if not facts:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        message = f"{name}: open_clip has no checkpoint {tag!r} of it; there are: {tags}"
        raise ConfigError(message)
    known = ("mean", "std", "interpolation", "resize_mode")
    config = _without_downloads(model_config)
    config["quick_gelu"] = bool(facts.get("quick_gelu", config.get("quick_gelu", False)))
    return Checkpoint(
        name=name,
        model_config=config,
        preprocessing={key: facts[key] for key in known if key in facts},
        weights=partial(open_clip.download_pretrained, facts),
    )


def _fetched(name: str, weights: Path | partial[str]) -> Path:
    if isinstance(weights, Path):
        return weights
    try:
        return Path(weights())
    except Exception as error:  # what a hub client raises has no common class
        message = (
            f"{name}: its weights are neither in the cache nor on a model hub that answers "
            f"({_first_line(error)}); download them elsewhere and name their folder"
        )
        raise ConfigError(message) from error


def _without_downloads(model_config: dict[str, Any]) -> dict[str, Any]:
    """The same architecture, but never fetching the weights its towers once started from."""
    config = copy.deepcopy(model_config)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    return config


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
