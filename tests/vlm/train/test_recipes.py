"""Every recipe in configs/train trains with the small overrides that its comment names."""

import re
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from tests.support import tiny_bundle, write_dataset
from vlm.config import load_config
from vlm.distributed import World
from vlm.optim import OptimizerConfig
from vlm.train import TrainConfig, train
from vlm.train.records import read_run

CONFIGS = Path(__file__).parents[3] / "configs/train"
RECIPES = sorted(p for p in CONFIGS.glob("*.yaml") if not p.stem.startswith("demo"))
# Their overrides name the files of a language model; tests/vlm/models/test_presets.py makes them.
ELSEWHERE = {"align_b7_bert", "coca_base", "coca_large", "lit_b32_bert", "siglip_b16"}


def documented(path: Path) -> str:
    """The overrides of the comment that begins with `Small:`."""
    comment = re.search(r"^# Small: (.*(?:\n#  +.*)*)", path.read_text(), re.MULTILINE)
    assert comment, f"{path.name} has no comment that begins with Small:"
    return re.sub(r"\n# +", " ", comment[1])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_cites_its_source_and_says_how_to_try_it(path: Path) -> None:
    assert re.search(r"arXiv:\d{4}\.\d{5}", path.read_text().splitlines()[0] + documented(path)
                     + path.read_text())  # fmt: skip
    assert "steps=2" in documented(path)


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if p.stem not in ELSEWHERE], ids=lambda p: p.stem
)
def test_every_recipe_trains_when_it_is_made_small(path: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 16)
    text = documented(path).replace("SHARDS", str(tmp_path / "shards"))
    if "BUNDLE" in text:
        tiny_bundle(tmp_path / "bundle")
        text = text.replace("BUNDLE", str(tmp_path / "bundle"))
    small = re.findall(r"[\w.]+=(?:\{.*?\}|\S+)", text)
    if "data.sources" not in text:
        small.append(f"data.shards={tmp_path / 'shards'}")
    config = load_config(TrainConfig, path, [*small, f"output={tmp_path}", "log_every=1"])
    assert train(config, world=World(), console=Console(quiet=True), resume=False).finished
    assert len(read_run(config.run_folder).records) == 2


def test_every_optimizer_has_a_config() -> None:
    configs = [load_config(TrainConfig, path, []) for path in CONFIGS.glob("*.yaml")]
    members = {
        member.model_fields["type"].default for member in get_args(get_args(OptimizerConfig)[0])
    }
    assert {config.optim.type for config in configs} == members
