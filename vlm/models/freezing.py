"""Which parts of a model learn, and what the others then do in training."""

from fnmatch import fnmatchcase

from pydantic import Field
from torch import nn

from vlm.config import Config
from vlm.errors import ConfigError
from vlm.models.depths import parameter_depths

__all__ = ["FreezeConfig", "evaluate_frozen", "freeze"]


class FreezeConfig(Config):
    """Parameters that stay as they are.

    `parameters: [image.*]` locks the image tower, as LiT does (arXiv:2111.07991). Modules of which
    every parameter is frozen are in evaluation mode throughout: running statistics do not move,
    nothing is dropped.
    """

    parameters: tuple[str, ...] = ()
    """Patterns of names, as in `model.named_parameters()`; `*` stands for anything."""
    unlock_last_blocks: int = Field(0, ge=0)
    """Of each frozen tower, so many last blocks (stages, where it has those) learn all the same,
    with what lies behind them: final norm, pooling, projection."""


def freeze(model: nn.Module, config: FreezeConfig) -> None:
    """Take the gradient from the parameters that `config` names, and give it to all others.

    Raises:
        ConfigError: If a pattern matches nothing, or nothing is left to learn.
    """
    depths = parameter_depths(name for name, _ in model.named_parameters())
    for pattern in config.parameters:
        if not any(fnmatchcase(name, pattern) for name in depths):
            message = (
                f"model.freeze.parameters: {pattern!r} matches no parameter; names begin with "
                f"{', '.join(sorted({name.partition('.')[0] for name in depths}))}"
            )
            raise ConfigError(message)
    deepest: dict[str, int] = {}
    for name, depth in depths.items():
        tower = name.partition(".")[0]
        deepest[tower] = max(deepest.get(tower, 0), depth or 0)
    for name, parameter in model.named_parameters():
        limit = deepest[name.partition(".")[0]] - config.unlock_last_blocks
        depth = depths[name]
        behind = config.unlock_last_blocks > 0 and (depth is None or depth > limit)
        matched = any(fnmatchcase(name, pattern) for pattern in config.parameters)
        parameter.requires_grad_(not matched or behind)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        message = f"model.freeze.parameters={list(config.parameters)}: nothing is left to learn"
        raise ConfigError(message)


def evaluate_frozen(model: nn.Module) -> None:
    """Put every module of which all parameters are frozen in evaluation mode."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
