from pathlib import Path

import pytest

from vlm.errors import BundleError
from vlm.inference.runtimes.artefact import ArtefactInfo, read_artefact, write_artefact

FINGERPRINT = "a" * 64


def written(folder: Path, text: str = "weights") -> ArtefactInfo:
    def write(draft: Path) -> None:
        (draft / "image.bin").write_text(text)

    return write_artefact(
        folder,
        write,
        fingerprint=FINGERPRINT,
        versions={"library": "1"},
    )


def test_what_is_written_is_read_and_a_second_time_replaces_it(tmp_path: Path) -> None:
    first = written(tmp_path / "x" / "r")
    assert read_artefact(tmp_path / "x" / "r", fingerprint=FINGERPRINT) == first
    second = written(tmp_path / "x" / "r", "other")
    assert read_artefact(tmp_path / "x" / "r", fingerprint=FINGERPRINT) == second != first
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["r"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        (draft / "half").write_text("x")
        message = "disk full"
        raise OSError(message)

    with pytest.raises(OSError, match="disk full"):
        write_artefact(tmp_path / "r", fail, fingerprint=FINGERPRINT, versions={})
    assert not list(tmp_path.iterdir())


def test_an_altered_byte_a_missing_file_and_another_bundle_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    written(folder)
    with pytest.raises(BundleError, match="asked for bbbbbbbbbbbb"):
        read_artefact(folder, fingerprint="b" * 64)
    (folder / "image.bin").write_text("Weights")
    with pytest.raises(BundleError, match=r"image\.bin altered since export"):
        read_artefact(folder, fingerprint=FINGERPRINT)
    (folder / "image.bin").unlink()
    with pytest.raises(BundleError, match=r"cannot read .*image\.bin"):
        read_artefact(folder, fingerprint=FINGERPRINT)
    (folder / "runtime.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        read_artefact(folder, fingerprint=FINGERPRINT)


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="name another folder"):
        written(tmp_path / "file" / "r")
