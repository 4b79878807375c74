from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from vlm.config import Config, apply_overrides, load_config
from vlm.errors import ConfigError


class Lion(Config):
    type: Literal["lion"] = "lion"
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = 0.5


class AdamW(Config):
    type: Literal["adamw"] = "adamw"
    lr: float = 1e-3


class Run(Config):
    name: str
    optim: Annotated[Lion | AdamW, Field(discriminator="type")]
    loss: list[dict[str, float]] = []


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_a_file_with_overrides_becomes_typed_values(tmp_path: Path) -> None:
    path = written(tmp_path, "name: a\noptim: {type: lion}\nloss: [{w: 1}, {w: 2}]\n")
    run = load_config(Run, path, ["optim.lr=3e-5", "loss.1.w=0.2", "name=b"])
    assert (run.name, run.optim.lr, run.loss) == ("b", 3e-5, [{"w": 1.0}, {"w": 0.2}])


def test_a_misspelt_key_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    path = written(tmp_path, "name: a\noptim: {type: lion, wieght_decay: 0.1}\n")
    with pytest.raises(
        ConfigError, match=r"optim\.lion\.wieght_decay: no such key; did you mean 'weight_decay'"
    ):
        load_config(Run, path, [])


def test_all_wrong_keys_are_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "nmae: a\noptim: {type: lion, lr: -1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path, [])
    message = str(caught.value)
    assert str(path) in message
    assert "name: this key is required" in message
    assert "nmae: no such key; did you mean 'name'?" in message
    assert "optim.lion.lr: Input should be greater than 0, found -1" in message


def test_a_missing_type_is_asked_for_with_the_known_ones(tmp_path: Path) -> None:
    path = written(tmp_path, "name: a\noptim: {lr: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path, [])
    said = "optim.type: this key is required beside the others; one of lion, adamw"
    assert said in str(caught.value)


def test_an_unknown_type_lists_the_known_ones(tmp_path: Path) -> None:
    path = written(tmp_path, "name: a\noptim: {type: sgd}\n")
    with pytest.raises(ConfigError, match=r"'lion', 'adamw'"):
        load_config(Run, path, [])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lr", "expected dotted.key=value"),
        ("loss.5.w=1", "index must be 0 to 0, found '5'"),
        ("name.x=1", "name is the value 'a', it has no keys"),
        ("name=[", "not valid YAML"),
    ],
)
def test_a_malformed_override_is_explained(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        apply_overrides({"name": "a", "loss": [{}]}, [override])


def test_overrides_leave_the_tree_they_are_given_alone() -> None:
    tree = {"a": {"b": 1}}
    assert apply_overrides(tree, ["a.b=2", "c.d=x"]) == {"a": {"b": 2}, "c": {"d": "x"}}
    assert tree == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "not valid YAML"), ("- 1", "expected a mapping"), (None, "cannot read")],
)
def test_a_file_that_is_no_configuration_is_named(
    tmp_path: Path, text: str | None, said: str
) -> None:
    path = tmp_path / "missing.yaml" if text is None else written(tmp_path, text)
    with pytest.raises(ConfigError, match=said):
        load_config(Run, path, [])
