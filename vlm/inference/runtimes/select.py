"""From the name of a runtime to one that has passed the gate, with the figures that say so."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from vlm.errors import BundleError
from vlm.inference.bundle import Bundle
from vlm.inference.runtimes.artefact import artefact_folder, read_artefact, write_artefact
from vlm.inference.runtimes.calibration import Calibration, drawn_calibration
from vlm.inference.runtimes.figures import (
    Figures,
    best_seconds,
    processor,
    read_figures,
    store_figures,
)
from vlm.inference.runtimes.openvino import (
    OPENVINO_NAMES,
    OpenVinoRuntime,
    Precision,
    export_openvino,
    openvino_is_installed,
    openvino_versions,
)
from vlm.inference.runtimes.parity import compare_rows, embed_pairs
from vlm.inference.runtimes.protocol import REFERENCE, Rows, Runtime, RuntimeName
from vlm.inference.runtimes.pytorch import TorchRuntime

__all__ = [
    "Figures",
    "RuntimeChoice",
    "export_runtime",
    "fastest_runtime",
    "gated_runtime",
    "runtime_name",
]

_CPU_CANDIDATES: Final[tuple[RuntimeName, ...]] = (
    "torch-fp32", "torch-bf16", "openvino-fp32", "openvino-bf16", "openvino-mixed",
    "openvino-int8",
)  # fmt: skip
_OPENVINO: Final[dict[RuntimeName, Precision]] = {n: p for p, n in OPENVINO_NAMES.items()}
_GPU_CANDIDATES: Final[tuple[RuntimeName, ...]] = ("torch-fp32", "torch-bf16")
_SPEED_BATCH: Final = 8


@dataclass(frozen=True, kw_only=True)
class RuntimeChoice:
    """A runtime that may answer, and what was measured on the way to it."""

    runtime: Runtime
    figures: tuple[Figures, ...] = ()


def runtime_name(text: str) -> RuntimeName:
    """A name such as `openvino-bf16`, checked to be one.

    Raises:
        BundleError: If there is no such runtime.
    """
    for name in _CPU_CANDIDATES:
        if name == text:
            return name
    message = f"no runtime {text!r}; there are {', '.join(_CPU_CANDIDATES)}"
    raise BundleError(message)


def export_runtime(
    name: RuntimeName,
    bundle: Bundle,
    *,
    cache: Path,
    calibration: Calibration | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Figures:
    """Export a runtime of a bundle into the cache, measure it here, and store the figures.

    Args:
        name: Runtimes of torch need no export and are only measured.
        bundle: Its model stays as it is.
        cache: Folder of all exports and figures.
        calibration: `int8` and `mixed` are fitted to one half, the other is compared; drawn if none
            is given.
        report: Gets lines about what takes long.

    Raises:
        BundleError: If the model cannot be exported.
    """
    bench = _Bench(bundle, device="cpu", cache=cache, calibration=calibration)
    if name.startswith("openvino"):
        bench.export(name, report)
    return bench.measure(name)


def gated_runtime(
    name: RuntimeName, bundle: Bundle, *, device: str = "cpu", cache: Path, streams: int = 1
) -> RuntimeChoice:
    """The runtime of that name, exported first if it is fp32 or bf16, which needs only the bundle.

    Stored figures of the same files on the same kind of machine count; otherwise it is measured on
    drawn pairs.

    Args:
        name: What computes.
        bundle: What is computed.
        device: Of torch.
        cache: Folder of all exports and figures.
        streams: Batches that OpenVINO computes at once; torch computes one after the other.

    Raises:
        BundleError: If it cannot run here or strays from the reference; the message says how far.
    """
    if name == REFERENCE:
        return RuntimeChoice(runtime=TorchRuntime(bundle.model, bundle.info.image, device=device))
    bench = _Bench(bundle, device=device, cache=cache)
    figures = bench.known(name) or bench.measure(name)
    if figures.refused is not None:
        message = (
            f"runtime {name} strays from {REFERENCE}: {figures.refused}. Serve "
            f"another runtime, or measure on your own pairs: vlm export BUNDLE --runtime … "
            f"--precision … --shards FOLDER"
        )
        raise BundleError(message)
    return RuntimeChoice(runtime=bench.build(name, streams), figures=(figures,))


def fastest_runtime(
    bundle: Bundle, *, device: str = "cpu", cache: Path, streams: int = 1
) -> RuntimeChoice:
    """The fastest runtime that runs here and passes the gate; the reference always does.

    int8 and mixed take part only once `export_runtime` has made them: what they are fitted to
    should be pairs like those that will be asked about, and that takes minutes.
    """
    bench = _Bench(bundle, device=device, cache=cache)
    names = _CPU_CANDIDATES if device == "cpu" else _GPU_CANDIDATES
    figures = sorted((bench.judge(name) for name in names), key=lambda f: f.seconds_per_pair)
    runtime = bench.build(figures[0].runtime, streams)
    return RuntimeChoice(runtime=runtime, figures=tuple(figures))


class _Bench:
    """One bundle on one device; the reference's rows are computed once, when first needed."""

    def __init__(
        self, bundle: Bundle, *, device: str, cache: Path, calibration: Calibration | None = None
    ) -> None:
        self._bundle = bundle
        self._device = device
        self._cache = cache
        self._calibration = calibration
        self._expected: tuple[Rows, Rows] | None = None

    def judge(self, name: RuntimeName) -> Figures:
        """Known or fresh figures; what cannot run is refused with the reason."""
        try:
            return self.known(name) or self.measure(name)
        except BundleError as error:
            return Figures(runtime=name, refused=str(error))

    def build(self, name: RuntimeName, streams: int = 1) -> Runtime:
        """Load a runtime; an fp32 export is made if it is missing or damaged."""
        info = self._bundle.info
        model = self._bundle.model
        if name == "torch-fp32" or name == "torch-bf16":
            kept: Literal["fp32", "bf16"] = "fp32" if name == "torch-fp32" else "bf16"
            return TorchRuntime(model, info.image, device=self._device, precision=kept)
        if self._device != "cpu":
            message = f"runtime {name} runs on device cpu, not on {self._device}"
            raise BundleError(message)
        folder = self._folder(name)
        try:
            read_artefact(folder, fingerprint=info.fingerprint)
        except BundleError as error:
            if _exported(name) != "fp32":
                found = str(error) if folder.is_dir() else "no exported runtime"  # without paths
                way = f"vlm export BUNDLE --runtime openvino --precision {_OPENVINO[name]}"
                message = f"{found} (looked for in `runtimes` beside it, or set); make it: {way}"
                raise BundleError(message) from error
            self.export(name)
        return OpenVinoRuntime(folder, precision=_OPENVINO[name], streams=streams)

    def export(self, name: RuntimeName, report: Callable[[str], None] = lambda _: None) -> None:
        precision = _exported(name)
        pairs = None if precision == "fp32" else self._halves()[1]
        if not openvino_is_installed(with_nncf=precision == "int8"):
            message = f"runtime {name} needs libraries: pip install 'vlm[openvino]'"
            raise BundleError(message)
        write_artefact(
            self._folder(name),
            lambda folder: export_openvino(
                self._bundle, folder, precision=precision, pairs=pairs, report=report
            ),
            fingerprint=self._bundle.info.fingerprint,
            versions=openvino_versions(),
            calibration=None if pairs is None else pairs.origin,
        )

    def measure(self, name: RuntimeName) -> Figures:
        """Compare with the reference, take the time of one call after another, and store both."""
        runtime = self.build(name)
        pairs, tokenizer = self._halves()[0], self._bundle.info.tokenizer
        if self._expected is None:
            self._expected = embed_pairs(self.build(REFERENCE), pairs, tokenizer)
        found = embed_pairs(runtime, pairs, tokenizer)
        parity = compare_rows(found, self._expected, origin=pairs.origin)
        pixels = pairs.pixel_batches(batch=_SPEED_BATCH)[0]
        token_ids = pairs.token_ids(tokenizer, batch=_SPEED_BATCH)[0]
        figures = Figures(
            runtime=name,
            parity=parity,
            images_per_second=len(pixels) / best_seconds(lambda: runtime.image_rows(pixels)),
            texts_per_second=len(token_ids) / best_seconds(lambda: runtime.text_rows(token_ids)),
            refused=parity.shortfall,
            conditions=self._conditions(name),
        )
        store_figures(self._figures_path(name), figures)
        return figures

    def known(self, name: RuntimeName) -> Figures | None:
        """Stored figures, if nothing that decides them has changed."""
        return read_figures(self._figures_path(name), conditions=self._conditions(name))

    def _conditions(self, name: RuntimeName) -> str:
        facts: dict[str, Any] = {
            "fingerprint": self._bundle.info.fingerprint,
            "device": self._device,
            "processor": processor(),
            "torch": torch.__version__,
        }
        if name.startswith("openvino"):
            facts["versions"] = openvino_versions()
            path = self._folder(name) / "runtime.json"
            facts["files"] = path.read_text(encoding="utf-8") if path.is_file() else None
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _halves(self) -> tuple[Calibration, Calibration]:
        """Pairs to compare on, and others that int8 and mixed are fitted to."""
        if self._calibration is None:
            self._calibration = drawn_calibration(self._bundle.info.image)
        return self._calibration.halves()

    def _folder(self, name: RuntimeName) -> Path:
        kind = f"openvino-{_exported(name)}"
        return artefact_folder(self._cache, self._bundle.info.fingerprint, kind)

    def _figures_path(self, name: RuntimeName) -> Path:
        return self._cache / f"{self._bundle.info.fingerprint[:16]}-{name}.figures.json"


def _exported(name: RuntimeName) -> Literal["fp32", "mixed", "int8"]:
    """The export that a runtime of OpenVINO is run from."""
    precision = _OPENVINO[name]
    return "fp32" if precision == "bf16" else precision
