"""Runtimes: several ways to compute the two towers of one bundle, and the gate they pass.

torch in fp32 is the reference. Any other runtime is compared with it on calibration pairs before it
may answer, see `parity`; `select` builds the one asked for, or the fastest that passes.
"""

from vlm.inference.runtimes.artefact import default_cache
from vlm.inference.runtimes.calibration import Calibration, calibration_pairs, drawn_calibration
from vlm.inference.runtimes.figures import Figures
from vlm.inference.runtimes.parity import Parity, measure_parity
from vlm.inference.runtimes.protocol import REFERENCE, Runtime, RuntimeName
from vlm.inference.runtimes.pytorch import TorchRuntime
from vlm.inference.runtimes.select import (
    RuntimeChoice,
    export_runtime,
    fastest_runtime,
    gated_runtime,
    runtime_name,
)

__all__ = [
    "REFERENCE",
    "Calibration",
    "Figures",
    "Parity",
    "Runtime",
    "RuntimeChoice",
    "RuntimeName",
    "TorchRuntime",
    "calibration_pairs",
    "default_cache",
    "drawn_calibration",
    "export_runtime",
    "fastest_runtime",
    "gated_runtime",
    "measure_parity",
    "runtime_name",
]
