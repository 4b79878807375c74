from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support import tiny_bundle, write_dataset
from vlm.cli.main import app
from vlm.errors import BundleError


def exported(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_bundle_is_exported_beside_itself_and_measured_on_the_shards_given(
    tmp_path: Path,
) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    info = tiny_bundle(tmp_path / "bundle")
    write_dataset(tmp_path / "shards")
    output = exported(
        tmp_path / "bundle", "--runtime", "openvino", "--precision", "fp32",
        "--shards", tmp_path / "shards",
    )  # fmt: skip
    assert "openvino-fp32: mean cosine to torch-fp32 1.00000 (images), 1.00000 (texts)" in output
    assert "top-1 agreement 100.00% over 8 of 16 pairs of shards" in output
    names = sorted(path.name for path in (tmp_path / "runtimes").iterdir())
    start = info.fingerprint[:16]
    assert names == [f"{start}-openvino-fp32", f"{start}-openvino-fp32.figures.json"]


def test_what_cannot_be_asked_of_a_bundle_is_told(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match="already a bundle; say which runtime to make of it"):
        exported(tmp_path / "bundle")
    with pytest.raises(BundleError, match="no runtime 'onnx-bf16'; there are torch-fp32"):
        exported(tmp_path / "bundle", "--runtime", "onnx")
