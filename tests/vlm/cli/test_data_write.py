"""`vlm data write` as a person and a scheduler meet it."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import drawn_samples, encoded, write_dataset
from vlm.data.sequential import iterate_samples
from vlm.preprocess import decode_image

COMMAND = (sys.executable, "-m", "vlm", "data", "write")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SHRINK = ("--size", "128", "--format", "webp", "--samples-per-shard", "10", "--workers", "2")
NUM_SHARDS = 16


def write(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take some 20 ms each to encode anew, one of them broken."""
    folder = tmp_path_factory.mktemp("photos") / "noise"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    for number in range(10 * NUM_SHARDS):
        (folder / f"{number:04d}.jpg").write_bytes(data if number != 33 else data[:1000])
    return folder.parent


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    done = write(photos, folder, *SHRINK, "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert f"writing shard {NUM_SHARDS}/{NUM_SHARDS}" in done.stdout
    assert "samples/s  ETA 0:00" in done.stdout
    assert f"159 pairs in {NUM_SHARDS} shards: {folder}" in done.stdout
    assert f"1 bad samples left out: {folder / 'skipped.jsonl'}" in done.stdout
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whole_group"),
    [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, False),
     (signal.SIGTERM, True), (signal.SIGINT, True)],
    ids=["kill", "kill all", "terminate", "terminate all", "interrupt all"],
)  # fmt: skip
def test_a_writer_ended_in_the_middle_goes_on_to_the_same_bytes(
    photos: Path, undisturbed: Path, tmp_path: Path, number: int, whole_group: bool
) -> None:
    folder = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, photos, folder, *SHRINK, "--skip-bad"],
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 180
    while len(list(folder.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    if number != signal.SIGKILL:
        # A scheduler knows by 75 that the same command goes on. Nothing but whole shards is left.
        said, _ = process.communicate(timeout=60)
        assert (process.returncode, "the same command goes on from them" in said) == (75, True)
        assert not list(folder.glob(".*.draft"))
    else:
        process.communicate(timeout=60)
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert 3 <= len(there) < NUM_SHARDS
    assert (folder / "writing.json").is_file()
    found = content(folder)
    assert {name: found[name] for name in there}.items() <= content(undisturbed).items()
    resumed = write(photos, folder, *SHRINK, "--skip-bad")
    assert resumed.returncode == 0, resumed.stderr
    assert f"of {NUM_SHARDS} shards are there already" in resumed.stdout
    assert content(folder) == content(undisturbed)
    assert all(path.is_file() for path in folder.iterdir())
    assert there.items() <= {p.name: p.stat().st_mtime_ns for p in folder.glob("*.tar")}.items()


def test_a_set_of_shards_is_sharded_and_encoded_anew(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", 12)
    done = write(
        tmp_path / "a", tmp_path / "b", "--size", 16, "--format", "jpeg", "--samples-per-shard", 5,
        "--workers", 2, "--prefix", "small",
    )  # fmt: skip
    assert "12 pairs in 3 shards" in done.stdout, done.stderr
    found = list(iterate_samples(tmp_path / "b"))
    assert [(s.key, s.text, s.metadata) for s in found] == [
        (s.key, s.text, s.metadata) for s in drawn_samples(12)
    ]
    assert {s.image[:2] for s in found} == {b"\xff\xd8"}
    assert {decode_image(s.image).shape for s in found} == {(16, 16, 3)}
    assert (tmp_path / "b" / "small-000002.tar").is_file()


def test_shards_without_an_index_are_told_to_be_indexed(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", 3)
    (tmp_path / "a" / "manifest.json").unlink()
    done = write(tmp_path / "a", tmp_path / "b")
    assert (done.returncode, "run `vlm data index" in done.stderr) == (2, True)
    assert not (tmp_path / "b").exists()


def test_a_bad_sample_is_named_and_how_to_go_on_without_it(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\nnowhere.png,a red fox\n")
    done = write(table, tmp_path / "out")
    assert done.returncode == 2
    assert "pairs.csv: row 0: sample '0': column 'image': cannot read image 'nowhere.png'" in (
        done.stderr
    )
    assert "--skip-bad" in done.stderr
    assert "Traceback" not in done.stderr


def test_in_a_terminal_there_is_a_live_line(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", 12)
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, tmp_path / "a", tmp_path / "b", "--samples-per-shard", "5"],
        env={**ENVIRONMENT, "TERM": "xterm"},
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            block = os.read(leader, 4096)
        except OSError:  # Linux says so when the other side is closed
            break
        if not block:
            break
        shown += block
    os.close(leader)
    assert process.wait(60) == 0
    assert b"3/3 shards" in shown
    assert b"\x1b[2K" in shown  # the line is drawn over
    assert b"12 pairs in 3 shards" in shown
