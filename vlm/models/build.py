"""Which models there are, and how a configuration becomes one."""

from typing import Annotated

from pydantic import Tag

from vlm.config import type_or
from vlm.models.coca import CoCa, CocaConfig
from vlm.models.dual_encoder import DualEncoder, DualEncoderConfig
from vlm.models.freezing import freeze
from vlm.models.recompute import recompute_blocks

__all__ = ["Model", "ModelConfig", "build_model"]

Model = DualEncoder | CoCa


ModelConfig = Annotated[
    Annotated[DualEncoderConfig, Tag("dual_encoder")] | Annotated[CocaConfig, Tag("coca")],
    type_or("dual_encoder"),
]


def build_model(
    config: DualEncoderConfig | CocaConfig, *, image_size: int, context_length: int
) -> Model:
    """The model with fresh weights, drawn from torch's own generator, in training mode.

    Raises:
        ConfigError: If towers do not go together, or what they are named after is not there.
    """
    model: Model
    if isinstance(config, CocaConfig):
        model = CoCa(config, image_size=image_size, context_length=context_length)
    else:
        model = DualEncoder(
            config.open_clip_config(image_size=image_size, context_length=context_length)
        )
    if config.gradient_checkpointing:
        recompute_blocks(model)
    freeze(model, config.freeze)
    return model.train()
