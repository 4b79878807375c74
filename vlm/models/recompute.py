"""Gradient checkpointing: blocks that are computed again in backward (arXiv:1604.06174)."""

from typing import Any

from torch import nn

from vlm.errors import ConfigError

__all__ = ["recompute_blocks"]


def recompute_blocks(model: nn.Module) -> None:
    """Keep only what goes into each block of both towers; gradients stay the same.

    Raises:
        ConfigError: If a tower cannot do so.
    """
    for name in ("image", "text"):
        tower = model.get_submodule(name)
        try:
            _recompute(tower)
        except (AttributeError, AssertionError, ValueError, NotImplementedError) as error:
            message = (
                f"model.gradient_checkpointing: the {name} tower ({type(tower).__name__}) cannot "
                f"do it ({error}); leave it out, or choose another tower"
            )
            raise ConfigError(message) from error


def _recompute(tower: Any) -> None:
    if hasattr(tower, "trunk"):  # of timm, asked itself: open_clip would only log its refusal
        tower.trunk.set_grad_checkpointing(True)
    elif hasattr(tower, "pooler"):
        tower.transformer.activation_checkpointing_enable({"use_reentrant": False})
    elif hasattr(tower, "attnpool"):
        message = "open_clip has no such thing for CLIP's ResNet"
        raise NotImplementedError(message)
    else:
        tower.set_grad_checkpointing(True)
