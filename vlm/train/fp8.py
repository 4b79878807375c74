"""Products of linear layers in 8-bit floating point, by torchao."""

from typing import Final

import torch
from torch import nn

from vlm.errors import ConfigError

__all__ = ["convert_to_fp8"]

_CAPABILITY: Final = (8, 9)
"""Of CUDA devices with 8-bit floating-point products: Ada, Hopper and newer."""


def convert_to_fp8(model: nn.Module, device: torch.device) -> None:
    """Let linear layers multiply in float8, their weights as they are; changed in place.

    Layers whose sides are no multiples of 16 stay, since such products do not exist.

    Raises:
        ConfigError: If the device has no such products, or torchao is not installed.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type}"
        message = (
            f"engine.precision=fp8 needs a CUDA device of compute capability "
            f"{'.'.join(map(str, _CAPABILITY))} or more, found {name}; take bf16 or auto"
        )
        raise ConfigError(message)
    try:
        from torchao.float8 import (  # type: ignore[import-not-found,unused-ignore] # noqa: PLC0415 - optional
            convert_to_float8_training,
        )
    except ImportError as error:
        message = (
            "engine.precision=fp8 needs the package torchao: pip install torchao, or take bf16"
        )
        raise ConfigError(message) from error
    convert_to_float8_training(model, module_filter_fn=_fits)


def _fits(module: nn.Module, name: str) -> bool:
    return (
        isinstance(module, nn.Linear)
        and module.in_features % 16 == 0
        and module.out_features % 16 == 0
    )
