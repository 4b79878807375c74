import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import TINY_MODEL, tiny_bundle
from vlm.errors import BundleError
from vlm.inference import Bundle, load_bundle, save_bundle
from vlm.inference.runtimes import TorchRuntime, drawn_calibration, measure_parity
from vlm.models import DualEncoder, DualEncoderConfig
from vlm.preprocess import ImageConfig, TokenizerConfig, build_tokenizer, trim_padding

pytest.importorskip("openvino", reason="the extra openvino is not installed")

from vlm.inference.runtimes.openvino import OpenVinoRuntime, export_openvino

TEXTS = ["a red circle", "blue", "a yellow square on a black ground with many more words"]
TOWERS = [
    TINY_MODEL["image"],
    {"type": "resnet", "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    {"type": "timm", "name": "test_resnet"},
]


def bundle_with(folder: Path, tower: dict[str, object]) -> Bundle:
    torch.manual_seed(0)
    config = DualEncoderConfig.model_validate({**TINY_MODEL, "image": tower})
    open_clip_config = config.open_clip_config(image_size=32, context_length=12)
    save_bundle(
        folder, DualEncoder(open_clip_config), name="x", open_clip_config=open_clip_config,
        image=ImageConfig(size=32), tokenizer=TokenizerConfig(context_length=12),
    )  # fmt: skip
    return load_bundle(folder)


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: str(tower["type"]))
def test_fp32_equals_torch_at_any_batch_and_any_text_length(
    tmp_path: Path, tower: dict[str, object]
) -> None:
    bundle = bundle_with(tmp_path / "b", tower)
    (tmp_path / "r").mkdir()
    export_openvino(bundle, tmp_path / "r")
    found = OpenVinoRuntime(tmp_path / "r", precision="fp32")
    expected = TorchRuntime(bundle.model, bundle.info.image)
    tokenize = build_tokenizer(bundle.info.tokenizer)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    for count in (5, 1, 3):
        images = found.image_rows(pixels[:count])
        np.testing.assert_allclose(images, expected.image_rows(pixels[:count]), atol=1e-5)
        assert images.dtype == np.float32
        for token_ids in (tokenize(TEXTS[:count]), trim_padding(tokenize(TEXTS[:count]))):
            rows = found.text_rows(token_ids.numpy())
            np.testing.assert_allclose(rows, expected.text_rows(token_ids.numpy()), atol=1e-5)


def test_pixels_that_lie_in_memory_by_rows_are_read_alike(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", TOWERS[0])
    (tmp_path / "r").mkdir()
    export_openvino(bundle, tmp_path / "r")
    runtime = OpenVinoRuntime(tmp_path / "r", precision="fp32")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    by_rows = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    first = runtime.image_rows(pixels)
    kept = first.copy()
    np.testing.assert_array_equal(runtime.image_rows(by_rows), first)
    runtime.image_rows(255 - pixels)
    np.testing.assert_array_equal(first, kept)  # a later call leaves earlier answers alone


def test_streams_answer_at_once_what_one_answers_alone(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", TOWERS[0])
    (tmp_path / "r").mkdir()
    export_openvino(bundle, tmp_path / "r")
    alone = OpenVinoRuntime(tmp_path / "r", precision="fp32")
    streams = OpenVinoRuntime(tmp_path / "r", precision="fp32", streams=2)
    assert (alone.streams, streams.streams) == (1, 2)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    with ThreadPoolExecutor(2) as pool:
        found = np.concatenate(list(pool.map(streams.image_rows, np.split(pixels, 12))))
    expected = alone.image_rows(pixels)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(streams.image_rows(pixels), expected, atol=1e-5)
    np.testing.assert_allclose(streams.image_rows(pixels[:1], alone=True), expected[:1], atol=1e-5)


def test_int8_stays_near_torch(tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="the extra openvino is not installed")
    tiny_bundle(tmp_path / "b")
    bundle = load_bundle(tmp_path / "b")
    (tmp_path / "r").mkdir()
    pairs = drawn_calibration(bundle.info.image, count=16)
    export_openvino(bundle, tmp_path / "r", precision="int8", pairs=pairs)
    runtime = OpenVinoRuntime(tmp_path / "r", precision="int8")
    reference = TorchRuntime(bundle.model, bundle.info.image)
    cosines = (runtime.image_rows(pairs.pixels) * reference.image_rows(pairs.pixels)).sum(axis=1)
    assert 0.95 < cosines.mean() < 1 - 1e-7  # near, and really of fewer bits


@pytest.mark.parametrize("tower", TOWERS[:1], ids=lambda tower: str(tower["type"]))
def test_mixed_passes_the_gate_and_says_what_is_in_bf16(
    tmp_path: Path, tower: dict[str, object]
) -> None:
    bundle = bundle_with(tmp_path / "b", tower)
    (tmp_path / "r").mkdir()
    fitted, judging = drawn_calibration(bundle.info.image, count=32).halves()
    lines: list[str] = []
    export_openvino(bundle, tmp_path / "r", precision="mixed", pairs=fitted, report=lines.append)
    runtime = OpenVinoRuntime(tmp_path / "r", precision="mixed")
    reference = TorchRuntime(bundle.model, bundle.info.image)
    parity = measure_parity(runtime, reference, judging, bundle.info.tokenizer)
    assert parity.image_cosine > 0.999
    assert 0.999 < parity.text_cosine < 1 - 1e-7  # near, and really of fewer bits
    chosen = json.loads((tmp_path / "r" / "mixed.json").read_text())
    assert any("c_fc" in kind and told["chosen"] for kind, told in chosen["text"].items())
    assert 0.9 < sum(told["share"] for told in chosen["text"].values()) <= 1.001
    assert len(lines) == 4 + len(chosen["image"]) + len(chosen["text"])


def test_a_model_that_cannot_be_traced_is_named(tmp_path: Path) -> None:
    class Untraceable(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            message = "no counterpart"
            raise NotImplementedError(message)

    bundle = bundle_with(tmp_path / "b", TOWERS[0])
    bundle.model.image = Untraceable()
    with pytest.raises(BundleError, match="cannot be exported to OpenVINO"):
        export_openvino(bundle, tmp_path)


def test_nothing_is_told_to_the_maker_of_the_library() -> None:
    code = (
        "import vlm.inference.runtimes.openvino as runtime\n"
        "runtime._openvino()\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "assert telemetry_utils.tm.__name__ == 'openvino.tools.ovc.telemetry_stub'\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
