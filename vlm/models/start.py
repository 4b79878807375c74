"""Weights that a fresh model starts from: of its towers, or of a whole model."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.checkpoints import find_checkpoint, read_weights
from vlm.models.coca import CoCa, CocaConfig
from vlm.models.dual_encoder import DualEncoder, DualEncoderConfig
from vlm.models.positions import fit_positions
from vlm.preprocess import ImageConfig

__all__ = ["load_initial_weights"]

_PROJECTIONS = ("proj", "proj.weight", "text_projection", "text_projection.weight",
                "text_projection.bias", "head.proj.weight", "head.proj.bias",
                "attnpool.c_proj.weight", "attnpool.c_proj.bias")  # fmt: skip
_COCA_CONFIG = "coca_config.json"


def load_initial_weights(
    model: DualEncoder | CoCa, config: DualEncoderConfig | CocaConfig, *, image: ImageConfig
) -> None:
    """Load what the configuration says to start from; fresh weights stay where it says nothing.

    First the towers' own weights, then those of `start`. Position embeddings are made to fit.

    Args:
        model: As `build_model` makes it of `config`.
        config: Its `start`, and the towers' `initial_weights`.
        image: What images the model will see: pretrained weights expect their own mean and std.

    Raises:
        ConfigError: If weights cannot be had, do not fit, or expect other images.
    """
    if isinstance(model, CoCa) or isinstance(config, CocaConfig):
        assert isinstance(model, CoCa)
        assert isinstance(config, CocaConfig)
        state = config.image.initial_weights()
        if state is not None:
            load_tower(model.image, state, text=False, where="model.image", strict=False)
        if config.start is not None:
            _start_coca(model, config.start)
        return
    for tower, module, where in (
        (config.image, model.image, "model.image"),
        (config.text, model.text, "model.text"),
    ):
        state = None if tower is None else tower.initial_weights()
        if state is not None:
            load_tower(module, state, text=where == "model.text", where=where)
    if config.start is not None:
        _start_dual_encoder(model, config.start, image)


def load_tower(
    tower: nn.Module, state: dict[str, Tensor], *, text: bool, where: str, strict: bool = True
) -> None:
    """Load weights into one tower; a projection to another width stays fresh.

    Args:
        tower: The module.
        state: Named as in the module.
        text: Whether it reads text.
        where: The section of the configuration, for messages.
        strict: Whether weights that the tower has no use for are an error.

    Raises:
        ConfigError: If the tower has parameters that the weights lack or have in another shape.
    """
    own = tower.state_dict()
    fitted = _fitted(tower, state, text=text, where=where)
    for name in _PROJECTIONS:
        if name in own and (name not in fitted or fitted[name].shape != own[name].shape):
            fitted[name] = own[name]
    # Our heads round a timm trunk, and a fresh projection behind an encoder of transformers.
    mine = ("head.", "proj.", "norm.", "positional_embedding")
    fitted |= {name: own[name] for name in own if name.startswith(mine) and name not in fitted}
    if not strict:
        fitted = {name: tensor for name, tensor in fitted.items() if name in own}
    _load(tower, fitted, where)


def _start_dual_encoder(model: DualEncoder, start: str, image: ImageConfig) -> None:
    checkpoint = find_checkpoint(start)
    _check_preprocessing(checkpoint.preprocessing, image, start)
    state = checkpoint.read_weights()
    state = _fitted_model(model, state, image="visual.", text="text.")
    try:
        model.load_open_clip_state(state)
    except RuntimeError as error:
        message = f"model.start={start}: weights of another model ({error})"
        raise ConfigError(message) from error


def _start_coca(model: CoCa, folder: Path) -> None:
    if not (folder / _COCA_CONFIG).is_file():
        message = f"model.start={folder}: no bundle of a CoCa, which alone a CoCa can start from"
        raise ConfigError(message)
    state = read_weights(folder / "model.safetensors")
    state = _fitted_model(model, state, image="image.", text="text.")
    _load(model, state, f"model.start={folder}")


def _fitted_model(
    model: DualEncoder | CoCa, state: dict[str, Tensor], *, image: str, text: str
) -> dict[str, Tensor]:
    """The weights of a whole model, its towers' fitted; `image` and `text` are their prefixes."""
    state = dict(state)
    for prefix, tower in ((image, model.image), (text, model.text)):
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        fitted = _fitted(tower, own, text=prefix == text, where="model.start")
        state |= {prefix + name: tensor for name, tensor in fitted.items()}
    # Whether there is a bias is for the loss to say, so for the configuration.
    if model.logit_bias is None:
        state.pop("logit_bias", None)
    else:
        state.setdefault("logit_bias", model.logit_bias.detach())
    return state


def _fitted(
    tower: nn.Module, state: dict[str, Tensor], *, text: bool, where: str
) -> dict[str, Tensor]:
    try:
        return fit_positions(tower, state, text=text)
    except ValueError as error:
        message = f"{where}: position embeddings cannot be resized ({error})"
        raise ConfigError(message) from error


def _load(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    with torch.no_grad():
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            message = f"{where}: weights of another model ({error})"
            raise ConfigError(message) from error


def _check_preprocessing(theirs: dict[str, Any], image: ImageConfig, start: str) -> None:
    """Pixels of another mean and deviation are another language to pretrained weights."""
    ours = {"mean": image.mean, "std": image.std, "resize_mode": image.resize_mode}
    differing = {
        key: theirs[key]
        for key, value in ours.items()
        if key in theirs and json.dumps(theirs[key]) != json.dumps(value)
    }
    if differing:
        wanted = " ".join(f"image.{key}={json.dumps(value)}" for key, value in differing.items())
        message = f"model.start={start}: was trained on images made otherwise; set {wanted}"
        raise ConfigError(message)
