"""The towers in OpenVINO: fp32, bf16 and int8 on processors of x86 and ARM.

    image.xml, image.bin   gray levels [batch 3 size size] -> unit rows [batch dim]
    text.xml, text.bin     token ids [batch token], trimmed or not -> unit rows [batch dim]

fp32 and bf16 share one export: bf16 is how it is run. int8 is an export of its own, quantised by
nncf (SmoothQuant, arXiv:2211.10438) with the ranges that calibration pairs show; so is mixed, which
multiplies in bf16 where calibration pairs show that it costs little, see `mixed.py`.
"""

import importlib
import importlib.util
import json
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vlm.errors import BundleError
from vlm.inference.bundle import Bundle
from vlm.inference.runtimes.calibration import Calibration
from vlm.inference.runtimes.mixed import mixed_tower
from vlm.inference.runtimes.protocol import Pixels, Rows, RuntimeName, TokenIds
from vlm.models import Model
from vlm.preprocess import ImageConfig

__all__ = [
    "OPENVINO_NAMES",
    "OpenVinoRuntime",
    "Precision",
    "export_openvino",
    "openvino_is_installed",
    "openvino_versions",
]

Precision = Literal["fp32", "bf16", "mixed", "int8"]
OPENVINO_NAMES: Final[dict[Precision, RuntimeName]] = {
    "fp32": "openvino-fp32",
    "bf16": "openvino-bf16",
    "mixed": "openvino-mixed",
    "int8": "openvino-int8",
}
# Between the products of int8 and mixed everything stays in fp32, nearer to the reference.
_HINTS: Final[dict[Precision, str]] = {
    "fp32": "f32", "bf16": "bf16", "mixed": "f32", "int8": "f32",
}  # fmt: skip
_CALIBRATION_BATCH: Final = 8


class OpenVinoRuntime:
    """An export of `export_openvino`, compiled for this machine's processor.

    Args:
        folder: Holds the export; its hashes have been verified.
        precision: `fp32` or `bf16` of an fp32 export, `mixed` or `int8` of one of their own.
        streams: Batches computed at once, each on its share of the cores. Threads of one batch wait
            for each other at every product, so that small batches in streams of one thread get
            through faster than one after the other on all cores. What is computed alone has all
            cores; for that each tower is compiled twice, and its weights are held twice.
    """

    def __init__(self, folder: Path, *, precision: Precision, streams: int = 1) -> None:
        self.name: RuntimeName = OPENVINO_NAMES[precision]
        self.streams = streams
        self._image = _Tower(folder / "image.xml", _HINTS[precision], streams)
        self._text = _Tower(folder / "text.xml", _HINTS[precision], streams)

    def image_rows(self, pixels: Pixels, *, alone: bool = False) -> Rows:
        return self._image(pixels, alone=alone)

    def text_rows(self, token_ids: TokenIds, *, alone: bool = False) -> Rows:
        return self._text(token_ids, alone=alone)


class _Tower:
    """A network, compiled for what is computed alone and, if there are several, for the streams."""

    def __init__(self, path: Path, hint: str, streams: int) -> None:
        self._alone = _Compiled(path, hint, streams=1)
        self._together = self._alone if streams == 1 else _Compiled(path, hint, streams=streams)

    def __call__(self, batch: np.ndarray, *, alone: bool) -> np.ndarray:
        return (self._alone if alone else self._together)(batch)


class _Compiled:
    """Each thread has a request of its own, for requests hold memory."""

    def __init__(self, path: Path, hint: str, *, streams: int) -> None:
        options = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": streams}
        self._compiled = _openvino().Core().compile_model(str(path), "CPU", options)
        self._local = threading.local()

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        results = self._local.request.infer({0: np.ascontiguousarray(batch)})
        return np.array(results[0])  # a copy: the next call writes into the same memory


def openvino_is_installed(*, with_nncf: bool = False) -> bool:
    """Whether the extra `openvino` is there; `with_nncf` also what int8 exports need."""
    needed = ("openvino", "nncf") if with_nncf else ("openvino",)
    return all(importlib.util.find_spec(name) is not None for name in needed)


def openvino_versions() -> dict[str, str]:
    """The versions that decide what an export computes."""
    names = [name for name in ("openvino", "nncf") if importlib.util.find_spec(name) is not None]
    return {name: metadata.version(name) for name in names}


def export_openvino(
    bundle: Bundle,
    folder: Path,
    *,
    precision: Literal["fp32", "mixed", "int8"] = "fp32",
    pairs: Calibration | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Write both towers of a bundle into `folder`, for `mixed` also `mixed.json`: what was chosen.

    Args:
        bundle: Its model is traced on the CPU, in fp32.
        folder: Exists and is empty.
        precision: Of the export.
        pairs: What `mixed` and `int8` are fitted to; none for fp32.
        report: Gets lines about what takes long.

    Raises:
        BundleError: If a part of the model has no counterpart in OpenVINO.
    """
    openvino = _openvino()
    try:
        towers = _converted(openvino, bundle)
        if precision == "int8":
            assert pairs is not None
            towers = _quantised(towers, bundle, pairs)
        elif precision == "mixed":
            assert pairs is not None
            inputs = _calibration_inputs(bundle, pairs)
            choices = {}
            for name, tower in towers.items():
                report(f"{name} tower, each kind of linear layer alone in bf16:")
                towers[name], chosen = mixed_tower(openvino, tower, inputs[name], report=report)
                choices[name] = {kind: asdict(choice) for kind, choice in chosen.items()}
            text = json.dumps(choices, indent=2) + "\n"
            (folder / "mixed.json").write_text(text, encoding="utf-8")
    except Exception as error:
        message = (
            f"bundle {bundle.info.fingerprint[:12]} cannot be exported to OpenVINO "
            f"({type(error).__name__}: {str(error)[:200]}); serve it with runtime=torch-fp32"
        )
        raise BundleError(message) from error
    for name, tower in towers.items():
        openvino.save_model(tower, str(folder / f"{name}.xml"), compress_to_fp16=False)


def _openvino() -> Any:
    """The library, without its telemetry: by default each conversion is told to the maker."""
    if not openvino_is_installed():
        message = "OpenVINO is not installed; pip install 'vlm[openvino]', or use a torch runtime"
        raise BundleError(message)
    if "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # as if not installed
    return importlib.import_module("openvino")


class _ImageTower(nn.Module):
    """Normalisation is part of the network, so that bytes go in and not four times as many."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: Model, config: ImageConfig) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(config.mean).view(1, 3, 1, 1))
        self.register_buffer("deviation", 255 * torch.tensor(config.std).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image((pixels.float() - self.mean) / self.deviation)


class _TextTower(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.model.encode_text(token_ids)


def _converted(openvino: Any, bundle: Bundle) -> dict[str, Any]:
    """Both towers with dynamic batch, the text's also with dynamic length."""
    size = bundle.info.image.size
    model = bundle.model.cpu().eval()
    with warnings.catch_warnings(), torch.inference_mode():
        # Tracing warns of each Python number it records; the parity gate runs other shapes.
        warnings.simplefilter("ignore")
        image = openvino.convert_model(
            _ImageTower(model, bundle.info.image).eval(),
            example_input=torch.zeros(2, 3, size, size, dtype=torch.uint8),
            input=[([-1, 3, size, size], openvino.Type.u8)],
        )
        text = openvino.convert_model(
            _TextTower(model).eval(),
            example_input=torch.tensor([[1, 2, 3], [1, 3, 0]]),
            input=[([-1, -1], openvino.Type.i64)],
        )
    return {"image": image, "text": text}


def _calibration_inputs(bundle: Bundle, pairs: Calibration) -> dict[str, list[np.ndarray]]:
    token_ids = pairs.token_ids(bundle.info.tokenizer, batch=_CALIBRATION_BATCH)
    return {"image": pairs.pixel_batches(batch=_CALIBRATION_BATCH), "text": token_ids}


def _quantised(towers: dict[str, Any], bundle: Bundle, pairs: Calibration) -> dict[str, Any]:
    nncf = importlib.import_module("nncf")
    inputs = _calibration_inputs(bundle, pairs)
    quantised = {}
    for name, tower in towers.items():
        quantised[name] = nncf.quantize(
            tower,
            nncf.Dataset(inputs[name]),
            subset_size=len(inputs[name]),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
        )
    return quantised
