from pathlib import Path

import numpy as np
import pytest

from tests.support import tiny_bundle
from vlm.errors import BundleError
from vlm.inference import Bundle, Encoder, load_bundle
from vlm.inference.runtimes import (
    REFERENCE,
    Figures,
    Parity,
    RuntimeName,
    default_cache,
    drawn_calibration,
    export_runtime,
    fastest_runtime,
    gated_runtime,
    runtime_name,
)
from vlm.inference.runtimes.openvino import OpenVinoRuntime
from vlm.inference.runtimes.pytorch import TorchRuntime
from vlm.inference.runtimes.select import _Bench

PASSED = Parity(
    image_cosine=1, text_cosine=1, top1_agreement=1, num_pairs=200, calibration="nothing"
)
NAMES: tuple[RuntimeName, ...] = (
    "torch-fp32", "torch-bf16", "openvino-fp32", "openvino-bf16", "openvino-mixed",
    "openvino-int8",
)  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    tiny_bundle(tmp_path / "bundle")
    return load_bundle(tmp_path / "bundle")


def with_figures(
    monkeypatch: pytest.MonkeyPatch, speeds: dict[RuntimeName, float], refused: set[RuntimeName]
) -> None:
    """Figures as if they had been measured; those not named cannot run."""

    def judge(_: _Bench, name: RuntimeName) -> Figures:
        if name not in speeds:
            return Figures(runtime=name, refused="cannot run here")
        return Figures(
            runtime=name,
            parity=PASSED,
            images_per_second=speeds[name],
            texts_per_second=speeds[name],
            refused="strays" if name in refused else None,
        )

    monkeypatch.setattr(_Bench, "judge", judge)


def test_the_fastest_that_passes_is_chosen_and_all_figures_are_told(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds: dict[RuntimeName, float] = {"torch-fp32": 10, "torch-bf16": 20, "openvino-bf16": 30}
    with_figures(monkeypatch, speeds, refused={"openvino-bf16"})
    choice = fastest_runtime(bundle, cache=tmp_path / "runtimes")
    assert choice.runtime.name == "torch-bf16"
    assert {figures.runtime for figures in choice.figures} == set(NAMES)


def test_the_reference_is_left_where_nothing_else_passes(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_figures(monkeypatch, {"torch-fp32": 1, "torch-bf16": 99}, refused={"torch-bf16"})
    assert fastest_runtime(bundle, cache=tmp_path).runtime.name == REFERENCE


def test_figures_count_again_only_for_the_same_files(bundle: Bundle, tmp_path: Path) -> None:
    bench = _Bench(bundle, device="cpu", cache=tmp_path)
    measured = bench.measure("torch-fp32")
    assert measured.parity is not None
    assert (measured.parity.top1_agreement, measured.parity.num_pairs) == (1, 200)
    assert measured.refused is None
    assert _Bench(bundle, device="cpu", cache=tmp_path).known("torch-fp32") == measured
    tiny_bundle(tmp_path / "other", seed=1)
    other = load_bundle(tmp_path / "other")
    assert _Bench(other, device="cpu", cache=tmp_path).known("torch-fp32") is None
    (stored,) = tmp_path.glob("*.figures.json")
    stored.write_text("{")
    assert bench.known("torch-fp32") is None


def test_a_runtime_that_strays_is_refused_with_how_far(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = TorchRuntime.image_rows

    def coarse(self: TorchRuntime, pixels: np.ndarray) -> np.ndarray:
        rows = exact(self, pixels)
        return rows if self.name == REFERENCE else np.roll(rows, 1, axis=1)

    monkeypatch.setattr(TorchRuntime, "image_rows", coarse)
    with pytest.raises(BundleError, match=r"torch-bf16 strays from torch-fp32: mean cosine of im"):
        gated_runtime("torch-bf16", bundle, cache=tmp_path)
    choice = fastest_runtime(bundle, cache=tmp_path)
    refused = {figures.runtime: figures.refused for figures in choice.figures}
    assert "mean cosine of images" in str(refused["torch-bf16"])
    assert refused[choice.runtime.name] is None


def test_a_name_that_is_none_lists_those_that_are() -> None:
    assert runtime_name("openvino-int8") == "openvino-int8"
    with pytest.raises(BundleError, match="no runtime 'onnx-fp32'; there are torch-fp32"):
        runtime_name("onnx-fp32")


def test_openvino_is_exported_once_and_again_when_it_is_damaged(
    bundle: Bundle, tmp_path: Path
) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    cache = default_cache(tmp_path / "bundle")
    first = gated_runtime("openvino-fp32", bundle, cache=cache)
    assert isinstance(first.runtime, OpenVinoRuntime)
    (weights,) = cache.glob("*-openvino-fp32/image.bin")
    stamp = weights.stat().st_mtime_ns
    rows = Encoder(bundle, runtime=first.runtime).encode_texts(["red", "a blue circle"])
    np.testing.assert_allclose(
        rows, Encoder(bundle).encode_texts(["red", "a blue circle"]), atol=1e-5
    )
    again = gated_runtime("openvino-fp32", bundle, cache=cache)
    assert again.figures == first.figures  # stored, not measured again
    assert weights.stat().st_mtime_ns == stamp
    damaged = bytearray(weights.read_bytes())
    damaged[0] ^= 1
    weights.write_bytes(damaged)
    gated_runtime("openvino-fp32", bundle, cache=cache)
    assert weights.stat().st_mtime_ns != stamp
    with pytest.raises(BundleError, match="runs on device cpu, not on cuda"):
        gated_runtime("openvino-fp32", bundle, device="cuda:0", cache=cache)


@pytest.mark.parametrize("precision", ["int8", "mixed"])
def test_what_is_fitted_takes_part_only_once_it_was_exported(
    bundle: Bundle, tmp_path: Path, precision: str
) -> None:
    pytest.importorskip("nncf", reason="the extra openvino is not installed")
    name = runtime_name(f"openvino-{precision}")
    bench = _Bench(bundle, device="cpu", cache=tmp_path)
    assert bench.judge(name).refused == (
        "no exported runtime (looked for in `runtimes` beside it, or set); make it: "
        f"vlm export BUNDLE --runtime openvino --precision {precision}"
    )
    pairs = drawn_calibration(bundle.info.image, count=40)
    figures = export_runtime(name, bundle, cache=tmp_path, calibration=pairs)
    assert figures.parity is not None
    assert figures.parity.calibration == "20 of 40 drawn pairs"
    assert bench.judge(name) == figures
