"""What a runtime is: two towers as functions of arrays, however they are computed."""

from typing import Final, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64, UInt8

__all__ = ["REFERENCE", "Pixels", "Rows", "Runtime", "RuntimeName", "TokenIds"]

RuntimeName = Literal[
    "torch-fp32", "torch-bf16", "openvino-fp32", "openvino-bf16", "openvino-mixed", "openvino-int8"
]
"""Library and precision of the matrix products; `mixed`: bf16 where it costs little, else fp32."""
REFERENCE: Final = "torch-fp32"
"""The runtime that training and evaluation use, and all others are compared with."""

Pixels = UInt8[np.ndarray, "batch channel height width"]
TokenIds = Int64[np.ndarray, "batch token"]
Rows = Float[np.ndarray, "batch dim"]


@runtime_checkable
class Runtime(Protocol):
    """Batches of any size to float32 unit rows; calls from several threads are safe."""

    @property
    def name(self) -> RuntimeName: ...

    @property
    def streams(self) -> int:
        """Calls that are best made at once: each keeps as many threads busy as it is given."""
        ...

    def image_rows(self, pixels: Pixels, *, alone: bool = False) -> Rows:
        """Embed gray levels 0 to 255, as `vlm.preprocess.resize_image` makes them.

        Args:
            pixels: Of any number of images.
            alone: Nothing else is computed meanwhile, so all cores are free, whatever the streams.
        """
        ...

    def text_rows(self, token_ids: TokenIds, *, alone: bool = False) -> Rows:
        """Embed token ids, which may be trimmed to the longest text; `alone` as of images."""
        ...
