"""How the settings of the optimizer reach the parameters of a real model."""

from typing import Any

import pytest

from tests.support import TINY_MODEL
from vlm.config import validate_config
from vlm.distributed import World
from vlm.errors import ConfigError
from vlm.train import TrainConfig
from vlm.train.setup import _build_engine, build_model


def configured(**changes: Any) -> TrainConfig:
    tree = {
        "name": "run", "steps": 4, "global_batch": 4, "image": {"size": 16},
        "data": {"shards": "nowhere"}, "model": TINY_MODEL, "loss": [{"type": "clip"}],
        "optim": {"type": "adamw"},
    }  # fmt: skip
    return validate_config(TrainConfig, {**tree, **changes}, source="test")


def test_layers_of_a_tower_learn_slower_towards_its_input() -> None:
    config = configured(optim={"type": "adamw", "lr": 1.0, "layer_decay": 0.5})
    model = build_model(config)
    engine = _build_engine(config, model, World(), 4)
    rates = {id(p): group["lr"] for group in engine.optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert found["image.conv1.weight"] == found["text.token_embedding.weight"] == 0.25
    assert found["image.transformer.resblocks.0.attn.in_proj_weight"] == 0.5
    assert found["image.proj"] == found["text.ln_final.weight"] == 1.0


def test_a_run_may_be_given_in_samples() -> None:
    assert configured(steps=None, samples=9).total_steps(100) == 3
    with pytest.raises(ConfigError, match="exactly one of steps, samples and epochs"):
        configured(samples=9)


def test_an_optimizer_of_whole_matrices_is_refused_under_deepspeed() -> None:
    with pytest.raises(ConfigError, match="optim.type=lamb looks at whole matrices"):
        configured(optim={"type": "lamb"}, engine={"type": "deepspeed"})
