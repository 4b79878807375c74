"""The house rules that tools do not check by themselves."""

import re
import subprocess
import typing
from pathlib import Path

import pytest

from vlm.config import load_config
from vlm.evaluation import EvaluationConfig
from vlm.losses import LossTerm
from vlm.models import ImageTower, TextTower
from vlm.train import TrainConfig

ROOT = Path(__file__).parents[2]


def sources() -> list[Path]:
    return sorted([*ROOT.glob("vlm/**/*.py"), *ROOT.glob("serving/**/*.py")])


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/train/*.yaml")), ids=lambda p: p.name)
def test_every_training_config_is_valid_and_named_after_its_file(path: Path) -> None:
    assert load_config(TrainConfig, path, []).name == path.stem


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/train/demo_*.yaml")), ids=lambda p: p.name
)
def test_configs_of_other_objectives_differ_from_the_demo_in_the_objective_alone(
    path: Path,
) -> None:
    own = {
        "name": ...,
        "loss": ...,
        "teacher": ...,
        "temperature": ...,
        "model": {"init_logit_scale", "init_logit_bias"},
    }
    if path.name == "demo_coca.yaml":
        # A model that captions has towers of its own, and learns to write in more, smaller steps;
        # the samples are the demo's.
        own |= {"model": ..., "global_batch": ..., "optim": ..., "checkpoint_every": ...}
    demo, other = (
        load_config(TrainConfig, ROOT / "configs/train" / name, []).model_dump(exclude=own)  # type: ignore[arg-type]
        for name in ("demo.yaml", path.name)
    )
    assert other == demo


def test_every_term_has_a_config_that_trains_with_it() -> None:
    union, _ = typing.get_args(LossTerm)
    known = {term.model_fields["type"].default for term in typing.get_args(union)}
    configs = [load_config(TrainConfig, p, []) for p in ROOT.glob("configs/train/*.yaml")]
    assert {term.type for config in configs for term in config.loss} == known


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/evaluate/*.yaml")), ids=lambda p: p.name)
def test_every_evaluation_config_is_valid(path: Path) -> None:
    assert load_config(EvaluationConfig, path, []).folders()


def test_training_reads_nothing_that_is_held_out() -> None:
    config = load_config(TrainConfig, ROOT / "configs/train/demo.yaml", [])
    (trained,) = (source.shards for source in config.data.all_sources)
    held_out = load_config(EvaluationConfig, ROOT / "configs/evaluate/emoji.yaml", []).folders()
    assert trained.endswith("/train")
    assert trained not in held_out


def test_every_file_is_short_enough_to_read() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources()
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_only_the_distributed_package_makes_process_groups_and_reads_ranks() -> None:
    pattern = re.compile(r"torch\.distributed|WORLD_SIZE|init_process_group")
    found = {
        str(path.relative_to(ROOT))
        for path in sources()
        if pattern.search(path.read_text()) and "vlm/distributed/" not in str(path)
    }
    assert not found


def test_the_environment_is_touched_in_three_files_alone() -> None:
    found = {str(path.relative_to(ROOT)) for path in sources() if "os.environ" in path.read_text()}
    assert found == {"vlm/distributed/world.py", "vlm/openmp.py", "serving/settings.py"}


def test_nothing_is_unpickled() -> None:
    pattern = re.compile(r"\bpickle\.load|weights_only=False|allow_pickle=True|\bmarshal\b")
    assert not [path for path in sources() if pattern.search(path.read_text())]


def test_every_suppressed_check_says_why() -> None:
    pattern = re.compile(r"#\s*(?:noqa: [A-Z]+\d+|type: ignore\[[\w,-]+\])(.*)")
    bare = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if (found := pattern.search(line)) and not re.search(r"[-#] \S+", found[1])
    ]
    assert not bare


def test_every_loss_term_is_in_the_table_of_losses() -> None:
    union = typing.get_args(typing.get_args(LossTerm)[0])
    table = (ROOT / "vlm/losses/README.md").read_text()
    for term in union:
        name = term.model_fields["type"].default
        assert f"`{name}`" in table


def test_every_tower_is_in_the_table_of_models_and_in_a_config() -> None:
    table = (ROOT / "vlm/models/README.md").read_text()
    configs = [load_config(TrainConfig, p, []) for p in ROOT.glob("configs/train/*.yaml")]
    used = {getattr(t, "type", "") for c in configs for t in (c.model.image, c.model.text)}
    for union in (ImageTower, TextTower):
        for member in typing.get_args(typing.get_args(union)[0]):
            tower = typing.get_args(member)[0] if typing.get_args(member) else member
            name = tower.model_fields["type"].default
            assert f"| `{name}` |" in table
            assert name in used | {"resnet"}  # which no preset needs


def test_nothing_committed_names_a_machine() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    pattern = re.compile(r"(^|[^a-z\w])/(wor" + r"k|roo" + r"t|hom" + r"e)/\w")
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".html", ".js", ".css"):
            assert not pattern.search(path.read_text(encoding="utf-8")), name
