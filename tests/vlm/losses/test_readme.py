"""The README of the losses says what is so: its table, its YAML and its example."""

import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch.testing import assert_close

import vlm.losses
from tests.support import unit_rows
from vlm.losses import LossTerm, total_loss
from vlm.types import CaptionSum, Features

README = (Path(vlm.losses.__file__).parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def features() -> Features:
    return Features(
        image=unit_rows(8, 6).float(),
        text=unit_rows(8, 6, seed=1).float(),
        logit_scale=torch.tensor([14.3]),
        logit_bias=torch.tensor([-10.0]),
        group_ids=torch.arange(8),
        teacher_image=unit_rows(8, 9, seed=2).float(),
        teacher_text=unit_rows(8, 9, seed=3).float(),
        teacher_logit_scale=torch.tensor([20.0]),
        label_ids=torch.arange(16).reshape(8, 2) // 3,
        captions=CaptionSum(loss=torch.tensor(50.0), tokens=torch.tensor(24.0)),
    )


def test_the_table_names_every_term_and_no_other() -> None:
    union, _ = typing.get_args(LossTerm)
    known = {term.model_fields["type"].default for term in typing.get_args(union)}
    assert set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)) == known


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.split("# ")[1][:12])
def test_every_loss_shown_is_a_configuration_with_a_finite_value(block: str) -> None:
    terms = TypeAdapter(list[LossTerm]).validate_python(yaml.safe_load(block)["loss"])
    assert torch.isfinite(total_loss(terms, features(), progress=0.6).total)


def test_the_example_of_a_new_loss_runs_and_is_right() -> None:
    (block,) = blocks("python")
    namespace: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), namespace)
    given = features()
    term = namespace["CentroidGapTerm"](weight=0.5)
    result = total_loss([term], given, progress=0.0)
    distance = (given.image.mean(0) - given.text.mean(0)).norm()
    assert_close(result.total, 0.5 * distance**2)
    assert_close(result.statistics["centroid_gap/distance"], distance)
