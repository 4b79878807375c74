"""The towers in torch: the reference in fp32, and bf16 where the processor has it."""

import copy
from typing import Final, Literal

import numpy as np
import torch

from vlm.inference.runtimes.protocol import Pixels, Rows, RuntimeName, TokenIds
from vlm.models import Model
from vlm.preprocess import ImageConfig, normalise_images

__all__ = ["TorchRuntime"]

_NAMES: Final[dict[str, RuntimeName]] = {"fp32": "torch-fp32", "bf16": "torch-bf16"}


class TorchRuntime:
    """A dual encoder on a device of torch.

    Args:
        model: In evaluation mode; moved to the device in fp32, copied for bf16.
        image: How gray levels are normalised.
        device: E.g. `cpu` or `cuda:0`.
        precision: Of weights and activations; unit rows are made in float32 either way.
    """

    def __init__(
        self,
        model: Model,
        image: ImageConfig,
        *,
        device: str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.name: RuntimeName = _NAMES[precision]
        self.streams = 1  # each call uses all threads of torch
        self._device = torch.device(device)
        self._image = image
        self._dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        own = model if precision == "fp32" else copy.deepcopy(model).to(self._dtype)
        self._model = own.to(self._device)

    @torch.inference_mode()
    def image_rows(self, pixels: Pixels, *, alone: bool = False) -> Rows:
        tensor = torch.from_numpy(pixels).to(self._device)
        floats = normalise_images(tensor, self._image).to(self._dtype)
        floats = floats.contiguous(memory_format=torch.channels_last)
        return _array(self._model.encode_image(floats))

    @torch.inference_mode()
    def text_rows(self, token_ids: TokenIds, *, alone: bool = False) -> Rows:
        return _array(self._model.encode_text(torch.from_numpy(token_ids).to(self._device)))


def _array(rows: torch.Tensor) -> np.ndarray:
    found: np.ndarray = rows.cpu().numpy()
    return found
